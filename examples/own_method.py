"""A custom method in one file: rounds of synthesis fill a bank of images, on which the student is trained.

Of the kind of CMI and Fast: the generator is told which class to make, its latents are optimised from scratch in each
round, and the networks see random crops of its images. Run as a script it shows, on the digits, what every run can do:

    python examples/own_method.py FOLDER    # taught, distilled, stopped half-way, resumed, reported, sampled, exported
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zskt
from zskt.cli.main import main

LATENT, BATCH, ROUND, UPDATES, CAPACITY = 32, 64, 8, 10, 2_048
SYNTHESIS = {
    "batchnorm": lambda b: zskt.losses.batchnorm_prior(b.teacher.statistics),
    "one_hot": lambda b: zskt.losses.one_hot(b.teacher.logits, b.labels),
    "adversary": lambda b: -zskt.losses.jensen_shannon(b.student.logits, b.teacher.logits),
}
DISTILLATION = {"kl": lambda b: 16 * zskt.losses.forward_kl(b.student.logits / 4, b.teacher.logits / 4)}


def crop(images: Tensor) -> Tensor:
    """A random crop of images (N, C, H, W) with one pixel of padding."""
    top, left = torch.randint(0, 3, (2,)).tolist()
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")  # (N, C, H + 2, W + 2)
    return padded[:, :, top : top + images.shape[2], left : left + images.shape[3]]


class ImageBank:
    """A step is one round of synthesis, then updates of the student from the bank."""

    def __init__(self, teacher: zskt.Classifier, student: nn.Module, config: zskt.Config) -> None:
        self.student, self.steps, self.classes = student, config.steps, teacher.num_classes
        self.ask_teacher = zskt.Observer(teacher.module, statistics=True)
        self.ask_student = zskt.Observer(student)
        self.generator = zskt.Generator(LATENT + self.classes, teacher.input_size, width=32).to(teacher.mean.device)
        adam, updates = torch.optim.Adam(student.parameters()), UPDATES * self.steps
        self.learn = zskt.Updates(UPDATES, adam, DISTILLATION, rate=lambda t: 1e-2 * (1 - t / updates))
        self.images = torch.empty(0, *teacher.input_size, device=teacher.mean.device)  # (M, C, H, W)

    def step(self) -> dict[str, Tensor]:
        synthesis = self.synthesise()
        return zskt.by_name("generator", synthesis) | zskt.by_name("student", [self.distil() for _ in range(UPDATES)])

    def synthesise(self) -> list[zskt.Losses]:
        """One round, with its own latents and optimiser; its final images go into the bank."""
        labels = torch.randint(self.classes, (BATCH,), device=self.images.device)  # (N,)
        z = torch.randn(BATCH, LATENT, device=self.images.device, requires_grad=True)  # (N, Z)
        groups = [{"params": [z], "lr": 1e-2}, {"params": self.generator.parameters(), "lr": 4e-3}]
        synthesis, losses = zskt.Updates(ROUND, torch.optim.Adam(groups), SYNTHESIS), list[zskt.Losses]()
        self.student.eval()
        for _ in range(ROUND):
            images = self.generator(torch.cat([z, F.one_hot(labels, self.classes)], dim=1))  # (N, C, H, W)
            seen = crop(images)
            losses.append(synthesis.update(zskt.Beliefs(seen, labels, self.ask_teacher(seen), self.ask_student(seen))))
        self.images = torch.cat([self.images, images.detach()])[-CAPACITY:]
        return losses

    def distil(self) -> zskt.Losses:
        """One update of the student on a batch from the bank."""
        images = crop(self.images[torch.randint(len(self.images), (BATCH,))])  # (N, C, H, W)
        with torch.no_grad():
            answers = self.ask_teacher(images)
        self.student.train()
        return self.learn.update(zskt.Beliefs(images, None, answers, self.ask_student(images)))

    def sample(self, n: int, seed: int) -> Tensor:
        return self.images[torch.randint(len(self.images), (n,), generator=torch.Generator().manual_seed(seed))]

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "generator": self.generator}

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"student": self.learn.optimizer}

    def state_dict(self) -> dict[str, Tensor]:
        return {"images": self.images, "done": torch.tensor(self.learn.done)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.images, self.learn.done = state["images"].to(self.images.device), int(state["done"])

    def close(self) -> None:
        self.ask_teacher.close()
        self.ask_student.close()


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own-method"
    teacher, run, own = f"{folder}/teacher", f"{folder}/run", ["--method", f"{__file__}:ImageBank", "--trust"]
    main(["teach", "--model", "convnet-32", "--data", "digits", "--epochs", "40", "--out", teacher])
    distil = ["distill", teacher, "--student", "convnet-8", *own, "--steps", "80", "--eval", "digits", "--out", run]
    main([*distil, "--stop-after", "40"])
    main([*distil, "--resume"])
    main(["sample", run, *own, "--teacher", teacher, "--out", f"{folder}/samples.png"])
    sys.exit(main(["export", run, *own, "--teacher", teacher, "--out", f"{folder}/student.onnx"]))
