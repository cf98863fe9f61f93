"""Tests of finemem_jax/runtime/display.py: what a pipe gets instead of a screen."""

from finemem_jax.runtime.display import Display, print_table

METRICS = {
    "reward/total": 0.12345,
    "reward/outcome": 0.5,
    "reward/chunk": 0.25,
    "operations/valid_fraction": 1.0,
    "memory/tokens": 41.6,
    "loss/entropy": 2.0,
    "time/new_tokens_per_second": 99.5,
    "time/step_seconds": 60.04,
}


def test_display_writes_lines_to_a_pipe(capsys):
    with Display(num_steps=3) as display:
        display.phase("step 1: rollouts and reader")
        display.step(0, METRICS)
        display.say("held-out: [bold]0.5[/bold]")
        display.step(1, METRICS | {"time/step_seconds": 90.0})
        display.step(2, {"time/step_seconds": 1.0})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == (
        "step 1/3 · reward 0.123 · global 0.500 · chunk 0.250 · valid ops 1.000 · memory tok 42 · entropy 2.00 · "
        "tok/s 100 · s/step 60.0 · left 2:00"
    )
    assert shown[1] == "held-out: [bold]0.5[/bold]"
    # The upper of two medians: 90 s for the one step left.
    assert shown[2].endswith("left 1:30")
    # What was not measured is a dash, not a zero.
    assert shown[3] == (
        "step 3/3 · reward - · global - · chunk - · valid ops - · memory tok - · entropy - · tok/s - · s/step 1.0 · "
        "left 0:00"
    )
    assert len(shown) == 4


def test_print_table_to_a_pipe(capsys):
    print_table("a run", ["what", "before"], [["held-out score", "0.250 ± 0.125"], ["[red]x[/red]", "1"]])
    shown = capsys.readouterr().out
    assert "a run" in shown
    assert "held-out score" in shown
    assert "0.250 ± 0.125" in shown
    assert "\x1b" not in shown
