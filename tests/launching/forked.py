"""A process that ``test_warm`` forks: it runs the code in its first argument."""

import os
import signal
import subprocess
import sys
import time

from scaletrain.host import forkserver
from scaletrain.host.forkserver import Order

FREE = (os, signal, subprocess, sys, time, forkserver, Order)  # names that the code may use
exec(sys.argv[1])
