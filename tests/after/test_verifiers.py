"""Verifiers of sampled answers: right and wrong ones of each type planted, recall and precision; final answers after
reasoning; hostile text ends in time and runs nothing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.after import latex
from trainer.after.final import answered, final_answer, steps_of
from trainer.after.scores import Frame, score
from trainer.data.sample import Key

SAME_SIZE = Frame(width=200, height=100, to_original=lambda x, y: (x, y))
THINK = "The picture shows 2 rows of 4 tiles.\nSo there are 8 tiles, 3 of them red.\n\n"

# task -> (key, answers that are right, answers that are wrong)
PLANTED: dict[str, list[tuple[Any, list[str], list[str]]]] = {
    "number": [
        (
            1200,
            ["1,200", "about 1210", f"{THINK}The answer is 1200.", f"{THINK}\\boxed{{1200}}", "1200 kg"],
            ["12", "1000", "1200 or 1300 in all: 1200 or 1400", "no idea", f"{THINK}The answer is 8."],
        ),
        (-5, ["-5", "−5", "It is -5."], ["5", "-6", ""]),
        (0, ["0", "zero"], ["0.1", "none"]),
    ],
    "count": [
        (3, ["3", "Three.", f"{THINK}Answer: 3", f"{THINK}<answer>3</answer>"], ["2", f"{THINK}Answer: 8", "3 or 4"]),
    ],
    "choice": [
        (
            "B",
            ["B", "(B)", "B. a dog", "The answer is B.", f"{THINK}\\boxed{{B}}", "I think it is B", "A cat? No: (B)."],
            ["A", "(A) a cat", "b-movie", f"{THINK}The answer is (C), not B.", "neither", "D"],
        ),
        ("top left", ["Top left.", f"{THINK}The answer is top left."], ["bottom left", "left"]),
    ],
    "exact": [
        ("aB-3", ["aB-3", " aB-3\n", f"{THINK}<answer>aB-3</answer>"], ["ab-3", "aB-3.", "aB 3", "aB-3 aB-3"]),
    ],
    "box": [
        (
            [20, 20, 60, 60],
            ["[20, 20, 60, 60]", '[{"bbox_2d": [22, 20, 60, 58], "label": "it"}]', f"{THINK}Answer: [18, 21, 61, 60]"],
            ["[100, 20, 140, 60]", "[20, 20, 30, 30]", "here", f"{THINK}Answer: [0, 0, 200, 100]"],
        ),
    ],
    "latex": [
        (r"\frac{1}{2}", [r"\dfrac12", "0.5", "$1/2$", r"The answer is $\frac{2}{4}$.", r"\boxed{\frac12}"],
         [r"\frac13", "0.51", "2", "half of it all is a lot", r"\frac{1}{"]),
        ("x^2+2x+1", ["(x+1)^2", r"\left(x+1\right)^{2}", r"f(x) \neq 0, \boxed{1 + 2x + x^2}"], ["x^2+1", "(x-1)^2"]),
        (r"2\sqrt{3}", [r"\sqrt{12}", r"2 \cdot 3^{\frac12}", r"\sqrt 3 + \sqrt3"], [r"3\sqrt2", "3.46"]),
        ("x=3", ["3", "$x = 3$", "3 = x"], ["x=4", "x>3"]),
        ("(1,2)", ["(1, 2)", r"\left(1,\frac42\right)"], ["(2,1)", "[1,2)", "1"]),
        (r"\{1,2\}", [r"\{2, 1\}", r"\left\{1,2\right\}"], [r"\{1\}", r"\{1,3\}", "(1,2)"]),
        (r"(-\infty,2)\cup(3,\infty)", [r"(3, \infty) \cup (-\infty, 2)"], [r"(-\infty,2)\cup[3,\infty)"]),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\begin{bmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{bmatrix}"],
         [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"]),
        (r"1\frac{1}{2}", ["1.5", r"\frac32"], [r"\frac12", "2"]),
        (r"x \geq 3", [r"3 \leq x", r"x \ge 3"], ["x>3", r"x \leq 3"]),
        (r"5\text{ cm}", ["5", r"5 \mathrm{cm}"], ["6", r"5 + x"]),
        (r"\pi r^2", [r"r^2 \pi", "πr²"], [r"2\pi r"]),
        (r"\text{even}", ["even"], ["odd", r"\text{odd}"]),
        ("1000", ["1,000", "1{,}000"], ["1,001", "1.000"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("task", PLANTED)
def test_right_answers_are_kept_and_wrong_ones_are_not(task: Any, capsys: pytest.CaptureFixture[str]):
    right = wrong = 0
    missed, fooled = [], []
    for value, good, bad in PLANTED[task]:
        for texts, want in ((good, 1.0), (bad, 0.0)):
            for text in texts:
                found = score(Key(task=task, value=value), text, SAME_SIZE)["correct"]
                right, wrong = right + (want == 1), wrong + (want == 0)
                if found != want:
                    (missed if want else fooled).append((value, text))
    kept = right - len(missed)
    recall, precision = kept / right, kept / max(kept + len(fooled), 1)
    with capsys.disabled():
        print(f"\nverifier {task}: recall {recall:.0%} of {right} right, precision {precision:.0%} with {wrong} wrong")
    assert not missed and not fooled


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("42", "42"),
        ("First 1. Then \\boxed{2} and \\boxed{3}.", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{never closed", "\\boxed{never closed"),
        ("a <ANSWER> b </answer> c", "b"),
        ("<answer>cut", "cut"),
        ("The answer is 3. No. The answer is 4.\n\nBye.", "4."),
        ("**Final answer:** B", "B"),
        ("I have no answer for that", "I have no answer for that"),
        ("Answer:", "Answer:"),
        ("所以答案是:三只。", "三只。"),
        ("", ""),
    ],
)
def test_the_final_answer_is_what_is_marked_last(text: str, final: str):
    assert final_answer(text) == final


def test_steps_are_the_sentences_and_lines_before_a_marked_answer():
    text = "Step 1: the sign on the left says 30.\n- It is red. Ok.\nSo the limit is 30.\n\nThe answer is 30."
    assert steps_of(text) == ["the sign on the left says 30.", "So the limit is 30."]
    assert steps_of("The sign says 30.") == [] and answered("No mark here.").reasoning == ""
    assert steps_of("图中有三只猫。桌子上有一只。答案是:三") == ["图中有三只猫。", "桌子上有一只。"]


HOSTILE = [
    "__import__('os').system('touch PATH')",
    r"\write18{touch PATH}",
    "{}" * 400,
    "(" * 900,
    "\x00" * 50,
    "1e999",
    r"\frac{1}{0}",
    r"\text{" * 150,
    r"\lim_{x\to 0}\frac{\sin(x!)}{x^{x^x}}",
    "9" * 990,
]


def test_hostile_latex_is_no_answer_and_runs_nothing(tmp_path: Path):
    for text in HOSTILE:
        found = score(Key(task="latex", value="7"), text.replace("PATH", str(tmp_path / "ran")))
        assert found["correct"] == 0.0
        found = score(Key(task="latex", value=text.replace("PATH", str(tmp_path / "ran"))), "7")
        assert found["correct"] == 0.0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["9^{9^{9^{9^9}}}", r"10^{10^{10^{10}}}!", r"\prod_{k=1}^{10000000} k"])
def test_a_comparison_without_end_is_ended_and_the_next_one_is_decided(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latex, "CPU_S", 1)
    assert latex.same("1+1", "2")
    process = latex._worker.process
    assert process is not None
    assert score(Key(task="latex", value="7"), text) == {"correct": 0.0, "undecided": 1.0}
    assert process.poll() is not None, "the process that computed is gone"
    assert latex.same("1+2", "3")


def test_a_process_with_many_open_files_compares():
    """select.select knows no descriptor above 1023; a process that trains holds more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
    latex._worker.stop()
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert latex.same("1+x", "x+1") and not latex.same("1+x", "x+2")
        assert latex._worker.process is not None and latex._worker.process.stdout is not None
        assert latex._worker.process.stdout.fileno() > 1023
    finally:
        latex._worker.stop()
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_under_a_limit_of_its_own_compares():
    """`ulimit -t`: its worker may not raise what it was started with."""
    program = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600)); "
    program += "from trainer.after import latex; print(latex.same('1+x', 'x+1'), latex.same('1+x', 'x+2'))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["True", "False"], found.stderr


FORKED = """
import os, sys, threading, time
from trainer.after import latex
assert latex.same("1+x", "x+1")
process, held = latex._worker.process, threading.Event()
def compare():
    with latex._worker.lock:
        held.set()
        time.sleep(1)
threading.Thread(target=compare, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:  # the thread that holds the lock is not here
    os._exit(0 if latex.same("1+x", "x+1") and not latex.same("1+x", "x+2") else 1)
_, status = os.waitpid(child, 0)
same = latex.same("2+x", "x+2") and latex._worker.process is process
print("child", os.waitstatus_to_exitcode(status), "parent", same)
"""


def test_a_fork_compares_while_another_thread_of_its_parent_does():
    found = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=60)
    assert found.stdout.split() == ["child", "0", "parent", "True"], found.stderr


def test_a_comparison_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latex, "WALL_S", 0.5)
    assert latex.same("1+1", "2")
    process = latex._worker.process
    assert process is not None
    os.kill(process.pid, 19)  # SIGSTOP: it computes nothing and takes no processor time
    began = time.monotonic()
    with pytest.raises(latex.Undecided):
        latex.same("1+1", "3-1+0")
    assert time.monotonic() - began < 10 and process.poll() is not None
    with pytest.raises(latex.Undecided):
        latex.same("1" * (latex.MAX_CHARACTERS + 1), "2")


@pytest.mark.parametrize(
    "piece", ["*", "\\boxed{", "<answer>", "answer ", "the answer is ", "答案", " ", "1 ", "(", "3 or"]
)
@pytest.mark.parametrize("task", ["number", "choice", "exact", "box", "text"])
def test_long_hostile_answers_end_in_seconds(piece: str, task: Any):
    value = {"number": 7, "choice": "B", "exact": "x", "box": [0, 0, 9, 9], "text": "some words"}[task]
    began = time.process_time()
    assert score(Key(task=task, value=value), piece * 20_000, SAME_SIZE)["correct"] == 0.0
    assert time.process_time() - began < 5
