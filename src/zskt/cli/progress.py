"""Live progress on stderr: a bar and a line of key figures."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from zskt.errors import to_stderr
from zskt.run.lifecycle import Event

notice = to_stderr


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f}/s" if task.speed else "", style="progress.data.speed")


def console() -> Console:
    """Stderr, for everything but the final JSON."""
    return Console(stderr=True, soft_wrap=True)


class _TwoLines(Progress):
    """The bar on one line and the key figures on the next, so that both fit 80 columns."""

    beside = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.beside:
            yield Text(self.beside)


@contextlib.contextmanager
def bar(phase: str, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar; call it with (done, total, key figures, lines to keep above it)."""
    progress = _TwoLines(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=15),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console(),
    )
    with progress:
        task = progress.add_task(phase, total=None)

        def show(done: int, total: int, beside: str = "", lines: Sequence[str] = ()) -> None:
            for line in lines:
                progress.console.print(line, markup=False, highlight=False)
            progress.beside = beside or progress.beside
            progress.update(task, completed=done, total=total)

        yield show


@contextlib.contextmanager
def distilling() -> Iterator[Callable[[Event], None]]:
    """A callback for `distill`: step k/N, rate, time left, losses, the teacher's confidence, class entropy."""
    with bar("distilling", "steps") as show:
        shown: dict[str, str] = {}

        def callback(event: Event) -> None:
            line = event.line or {}
            losses = {key.removesuffix("_loss"): value for key, value in line.items() if key.endswith("_loss")}
            if losses:
                last = {name: value[-1] if isinstance(value, list) else value for name, value in losses.items()}
                shown["losses"] = "loss " + " ".join(f"{name} {value:.4f}" for name, value in last.items())
            if "teacher_confidence" in line:
                shown["teacher"] = f"teacher confidence {line['teacher_confidence']:.2f}"
                shown["classes"] = f"class entropy {line['class_entropy']:.2f}"
            if "accuracy" in line:
                shown["accuracy"] = f"test {100 * line['accuracy']:.2f} %"
            warnings = [f"warning at step {event.step:,}: {text}" for text in line.get("warnings", [])]
            show(event.step, event.steps, "  ".join(shown.values()), warnings)

        yield callback


@contextlib.contextmanager
def teaching(phase: str = "teaching") -> Iterator[Callable[[Event], None]]:
    """A callback for `teach` and `train_student`: update k/N, rate, time left, accuracy."""
    with bar(phase, "updates") as show:

        def callback(event: Event) -> None:
            accuracy = (event.line or {}).get("accuracy")
            show(event.step, event.steps, "" if accuracy is None else f"test {100 * accuracy:.2f} %")

        yield callback
