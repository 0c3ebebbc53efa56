"""transformers' ViLT for question answering at a small size, trained unpatched and patched in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from python_models.demo import inputs
from python_models.vqa.data import Dataset
from python_models.vqa.results import loss_difference

# Width, heads and depth between those of ViT-Tiny and a toy; 80 x 80 pixels in patches of 4 give 400 image tokens, as
# a ViT-B/16 has at 320 x 320. Dropout is 0, the default of ViLT.
WIDTH, HEADS, LAYERS, PATCH = 128, 4, 2, 4
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 1e-3, 40, 0.05
# Steps that are not timed.
UNTIMED = 2


def build(tokenizer: inputs.Tokenizer, answers: int, seed: int = 0) -> nn.Module:
    """transformers' ViltForQuestionAnswering with random weights."""
    import transformers

    config = transformers.ViltConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * WIDTH,
        image_size=inputs.IMAGE_SIZE,
        patch_size=PATCH,
        max_position_embeddings=tokenizer.length,
        num_labels=answers,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # For a width of 128; the default, 0.02, is for 768 and learns slowly here.
        initializer_range=0.06,
    )
    torch.manual_seed(seed)
    return transformers.ViltForQuestionAnswering(config)


@dataclass
class Trained:
    """A model in training, with the seconds and the loss of each step."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), fused=True
        )

    def step(self, given: dict[str, Tensor], answer: Tensor) -> None:
        """One training step, timed from inputs to updated weights."""
        number = len(self.losses)
        # ViLT draws the order of its image patches.
        torch.manual_seed(number)
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (number + 1) / WARM_UP)
        loss = nn.functional.cross_entropy(self.model(**given).logits, answer)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())

    @property
    def median_seconds(self) -> float:
        """Of a step, without the first ones."""
        return statistics.median(self.seconds[min(UNTIMED, len(self.seconds) - 1) :])


@dataclass(frozen=True)
class InTurns:
    """The same model and the same batches, unpatched and patched.

    Attributes:
        plain, patched: the two.
        report: what ``patch`` returned.
    """

    plain: Trained
    patched: Trained
    report: Any

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of the losses of a step; NaN if one of them is."""
        return loss_difference(self.plain.losses, self.patched.losses)


def in_turns(
    model: nn.Module,
    patch: Callable[[nn.Module], Any],
    dataset: Dataset,
    tokenizer: inputs.Tokenizer,
    *,
    steps: int,
    batch_size: int,
    progress: Callable[[Trained, Trained], None] = lambda plain, patched: None,
) -> InTurns:
    """Train a copy of ``model`` as it is and a patched copy on the same batches, in turns: A B, B A, A B, ...

    Args:
        progress: called after each step of both.
    """
    plain, patched = Trained(copy.deepcopy(model).train()), Trained(copy.deepcopy(model).train())
    report = patch(patched.model)
    part = dataset.parts["train"]
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        rows = torch.randint(len(part), (batch_size,), generator=generator)
        given = inputs.batch(dataset, part, rows, tokenizer)
        for trained in (plain, patched) if number % 2 == 0 else (patched, plain):
            trained.step(given, part.answer[rows])
        progress(plain, patched)
    return InTurns(plain, patched, report)
