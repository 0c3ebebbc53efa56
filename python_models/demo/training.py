"""ViLT for question answering at a small size, trained the same way unpatched and patched, side by side."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from python_models.demo import data

# Width, heads and depth between those of ViT-Tiny and a toy; 80 x 80 pixels in patches of 4 give 400 image tokens, as
# a ViT-B/16 has at 320 x 320. Dropout is 0, the default of ViLT.
WIDTH, HEADS, LAYERS, PATCH = 128, 4, 2, 4
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 1e-3, 40, 0.05


def build(vocabulary: int, text_length: int, seed: int = 0) -> nn.Module:
    """transformers' ViltForQuestionAnswering with random weights."""
    import transformers

    config = transformers.ViltConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * WIDTH,
        image_size=data.IMAGE_SIZE,
        patch_size=PATCH,
        max_position_embeddings=text_length,
        num_labels=len(data.answers()),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        # For a width of 128; the default, 0.02, is for 768 and learns slowly here.
        initializer_range=0.06,
    )
    torch.manual_seed(seed)
    return transformers.ViltForQuestionAnswering(config)


@dataclass
class Trained:
    """A model in training, with what each step cost and gave."""

    model: nn.Module
    steps: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98), fused=True
        )

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * decay

    def step(self, inputs: dict[str, Tensor], answer: Tensor) -> None:
        """One training step, timed from inputs to updated weights."""
        number = len(self.losses)
        # ViLT draws the order of its image patches.
        torch.manual_seed(number)
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        logits = self.model(**inputs).logits
        loss = nn.functional.cross_entropy(logits, answer)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())


def side_by_side(
    model: nn.Module,
    patch: Callable[[nn.Module], Any],
    train: data.Split,
    *,
    together: int,
    steps: int,
    batch_size: int,
    progress: Callable[[Trained, Trained], None],
) -> tuple[Trained, Trained, Any]:
    """Train a copy of ``model`` as it is and a patched copy on the same batches, in turns: A B, B A, A B, ...

    Args:
        together: steps of both.
        steps: steps of the patched one, which goes on alone after those.
        progress: called after each step.

    Returns:
        (unpatched, patched, what ``patch`` returned).
    """
    plain, fast = Trained(copy.deepcopy(model).train(), steps), Trained(copy.deepcopy(model).train(), steps)
    report = patch(fast.model)
    generator = torch.Generator().manual_seed(0)
    for number in range(steps):
        rows = torch.randint(len(train), (batch_size,), generator=generator)
        inputs, answer = data.batch(train, rows), train.answer[rows]
        if number < together:
            for trained in (plain, fast) if number % 2 == 0 else (fast, plain):
                trained.step(inputs, answer)
        else:
            fast.step(inputs, answer)
        progress(plain, fast)
    return plain, fast, report


def predict(model: nn.Module, split: data.Split, rows: Tensor, batch_size: int = 100) -> Tensor:
    """The index of the answer that the model gives to each of the questions ``rows``."""
    model.eval()
    found = []
    with torch.inference_mode():
        for part in rows.split(batch_size):
            torch.manual_seed(0)
            found.append(model(**data.batch(split, part)).logits.argmax(-1))
    return torch.cat(found)


def accuracy(model: nn.Module, split: data.Split, rows: Tensor) -> dict[str, float]:
    """The share of right answers, of all and by kind of question."""
    names = data.answers()
    predicted, right = predict(model, split, rows), split.answer[rows]
    ok = (predicted == right).float()
    kinds = {"yes or no": {"yes", "no"}, "which shape": {"circle", "rectangle", "triangle"}}
    groups = {kind: torch.tensor([names[int(answer)] in given for answer in right]) for kind, given in kinds.items()}
    groups["which colour"] = ~(groups["yes or no"] | groups["which shape"])
    return {"all": float(ok.mean())} | {kind: float(ok[chosen].mean()) for kind, chosen in groups.items()}
