#!/bin/sh
# Build Horovod 0.28.1 for a Python that has torch, and install it there:
#   launch/build_horovod.sh [PYTHON]
# Needs a C++ compiler, cmake and, for MPI, Open MPI's headers
# (Debian: g++ cmake openmpi-bin libopenmpi-dev).
# 0.28.1 is Horovod's last release. It asks for C++14, but torch's headers need C++17, so two lines
# are changed, and nothing else.
set -eu
python=${1:-.venv/bin/python}
version=0.28.1
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")

fail() { echo "build_horovod: $*" >&2; exit 1; }
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch (make setup)"
command -v cmake >/dev/null || fail "cmake is missing (Debian: apt-get install cmake)"
command -v g++ >/dev/null || fail "g++ is missing (Debian: apt-get install g++)"
if "$python" -c 'import horovod.torch as hvd; hvd.init(); assert hvd.size() == 1' 2>/dev/null; then
    echo "build_horovod: a Horovod that works is there already"; exit 0
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$python" -m pip install --quiet 'setuptools<81' wheel packaging cloudpickle psutil pyyaml
"$python" -m pip download --quiet --no-deps --no-binary horovod --no-build-isolation "horovod==$version" \
    || fail "cannot download horovod $version"
tar xzf "horovod-$version.tar.gz"
cd "horovod-$version"
sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' CMakeLists.txt horovod/torch/CMakeLists.txt
[ "$(grep -l 'set(CMAKE_CXX_STANDARD 17)' CMakeLists.txt horovod/torch/CMakeLists.txt | wc -l)" = 2 ] || fail "the source is not as expected"

if command -v mpicxx >/dev/null; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
export MAKEFLAGS="${MAKEFLAGS:--j$(nproc)}" LDFLAGS="${LDFLAGS:--s}"
if ! "$python" -m pip wheel --no-build-isolation --no-deps --wheel-dir "$work" . >"$work/build.log" 2>&1; then
    tail -40 "$work/build.log" >&2
    fail "the build failed"
fi
"$python" -m pip install --quiet --no-deps --force-reinstall "$work"/horovod-*.whl
cd /
"$python" -c 'import horovod.torch as hvd; hvd.init(); print("Horovod", hvd.size(), "MPI:", hvd.mpi_built(), "gloo:", hvd.gloo_built())'
