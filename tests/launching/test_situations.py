"""Each situation that docs/launchers/README.md describes is brought about by a test. Bug it
catches: a row that promises something which no test shows, or a test that was removed.
"""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "launchers" / "README.md"

# The beginning of each row, and the tests that bring it about.
SHOWN_BY = {
    "a rank has failed, but a thread": (
        "launching/test_ends.py::test_a_reported_failure_ends_the_job_whatever_keeps_the_process",
        "launching/test_ends.py::test_a_failed_rank_of_another_launcher_ends_itself",
    ),
    "a rank has finished, and its process runs on": (
        "launching/test_ends.py::test_success_that_cannot_end_stays_success",
        "launching/test_ends.py::test_a_finished_rank_may_serve_those_that_work",
    ),
    "a launcher such as mpirun runs on": (
        "launching/test_ends.py::test_a_launcher_that_does_not_end_after_its_workers_is_ended",
        "launching/test_ends.py::test_a_launcher_that_starts_workers_again_is_left_alone",
    ),
    "the shell ignores SIGCHLD": (
        "launching/test_signals.py::test_a_shell_that_ignores_sigchld_sees_the_status",
        "launching/test_signals.py::test_workers_start_with_the_usual_signals",
    ),
    "a job in the background of a script": (
        "launching/test_signals.py::test_a_background_job_ends_neither_by_ctrl_c_nor_under_nohup",
    ),
    "SIGINT or SIGTERM, and all workers end with 0": (
        "launching/test_signals.py::test_a_stopped_job_is_no_success_even_if_its_workers_say_so",
        "launching/test_signals.py::"
        "test_a_training_run_that_had_finished_when_it_was_stopped_is_a_success",
    ),
    "SIGUSR2 to `scaletrain train`": (
        "test_commands.py::test_a_signal_stops_all_ranks_and_the_run_goes_on_with_resume",
        "launching/test_signals.py::test_sigusr2_reaches_a_script_and_stops_nothing",
    ),
    "SIGUSR1, and all workers end with 0": (
        "launching/test_signals.py::test_a_stopped_job_is_no_success_even_if_its_workers_say_so",
    ),
    "two commands start in the same second": (
        "run/test_claim.py::test_two_launches_of_the_same_second_have_two_directories",
    ),
    "`--run-dir` or `--out` is in use": (
        "run/test_claim.py::test_a_live_job_keeps_its_directory",
        "run/test_claim.py::test_the_hosts_of_one_job_share_a_directory",
    ),
    "a job on several hosts is started without": (
        "launching/test_plans.py::test_the_hosts_of_a_job_need_a_directory_in_common",
    ),
    "the whole job is stopped": (
        "launching/test_supervise.py::"
        "test_a_job_that_is_stopped_as_a_whole_and_goes_on_is_no_hang",
        "launching/test_training_job.py::"
        "test_a_job_that_is_stopped_as_a_whole_for_longer_than_all_its_limits_goes_on",
        "launching/test_hangs.py::test_a_job_that_was_stopped_as_a_whole_gets_its_time_anew",
    ),
    "a clock is put forward or back": (
        "launching/test_hangs.py::test_a_clock_that_is_put_makes_no_hang_and_hides_none",
        "launching/test_hangs.py::test_a_host_whose_clock_differs_is_watched_like_any_other",
        "launching/test_supervise.py::"
        "test_the_traceback_of_a_host_whose_clock_is_behind_is_shown",
        "launching/test_supervise.py::"
        "test_a_killed_rank_is_named_though_the_clock_of_another_host_is_behind",
    ),
    "workers write umlauts": (
        "launching/test_screen.py::test_the_bytes_of_one_process_are_unchanged",
        "launching/test_screen.py::test_a_prompt_and_a_progress_bar_are_shown_as_they_come",
        "launching/test_screen.py::test_a_long_line_is_shown_whole",
    ),
    "arguments, the working directory or an exception": (
        "launching/test_screen.py::test_names_that_are_not_utf_8_reach_the_program",
        "launching/test_screen.py::test_an_exception_whose_text_is_not_utf_8_is_shown",
    ),
    "the reader of the output goes": (
        "launching/test_screen.py::test_a_reader_that_leaves_does_not_shorten_the_job",
        "launching/test_screen.py::"
        "test_workers_keep_their_time_for_a_checkpoint_when_the_terminal_closes",
        "launching/test_screen.py::test_a_full_disk_under_the_log_does_not_end_the_job",
    ),
    "a file of `RUN_DIR/logs` cannot be written": (
        "launching/test_output.py::test_a_full_disk_is_told_once_and_may_have_room_again",
        "launching/test_output.py::test_a_removed_run_directory_stays_away",
    ),
    "the run directory is gone, or its disk is full": (
        "launching/test_screen.py::test_a_run_directory_that_is_gone_does_not_hide_the_cause",
        "launching/test_screen.py::"
        "test_a_full_disk_of_the_run_directory_does_not_hide_the_cause",
    ),
    "a worker has started helpers": (
        "launching/test_left_behind.py::test_no_helper_survives_whatever_it_did",
        "launching/test_left_behind.py::test_no_helper_survives_a_killed_supervisor",
    ),
    "finished workers have left a process running": (
        "launching/test_left_behind.py::test_an_upload_that_a_finished_rank_left_gets_time",
        "launching/test_left_behind.py::test_an_interrupt_ends_the_wait_for_an_upload",
    ),
    "`scaletrain` is process 1": (
        "launching/test_left_behind.py::test_process_1_reaps_orphans_and_keeps_the_status",
        "launching/test_left_behind.py::test_process_1_passes_signals_on",
    ),
    "options behind the script": (
        "launching/test_terminal.py::test_options_behind_the_script_are_its_own",
        "launching/test_terminal.py::test_an_unknown_option_before_the_script_is_a_mistake",
    ),
    "the working directory has been removed": (
        "launching/test_terminal.py::test_a_removed_working_directory_is_one_line",
    ),
    "the host knows IPv6 alone": (
        "launching/test_terminal.py::test_a_host_that_knows_ipv6_alone",
    ),
    "Ctrl-Z, then `fg`": (
        "launching/test_terminal.py::"
        "test_ctrl_z_stops_workers_and_their_helpers_and_fg_continues_them",
    ),
    "Ctrl-C in the first second": (
        "launching/test_terminal.py::test_ctrl_c_in_the_first_second_is_one_line",
    ),
}  # fmt: skip


def rows() -> list[str]:
    """Return the first cells of the table of situations."""
    page = PAGE.read_text(encoding="utf-8")
    table = page.partition("| what happens | what the launcher does |\n")[2].partition("\n\n")[0]
    return [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()[1:]]


def test_each_situation_of_the_page_is_shown_by_tests():
    named = {}
    for row in rows():
        named[row] = [beginning for beginning in SHOWN_BY if row.startswith(beginning)]
    assert all(len(beginnings) == 1 for beginnings in named.values()), named
    assert len(named) == len(SHOWN_BY)


def test_the_tests_are_there():
    for tests in SHOWN_BY.values():
        for test in tests:
            file, _, name = test.partition("::")
            text = (TESTS / file).read_text(encoding="utf-8")
            assert re.search(rf"^ *def {name}\(", text, re.MULTILINE), test
