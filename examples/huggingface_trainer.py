"""Hugging Face Trainer: a small encoder learns from a larger one, token sequences pooled by their mean.

`python examples/huggingface_trainer.py` runs it.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import pc_kernels


class Sentences(Dataset[dict[str, Tensor]]):
    """Random token sequences of different lengths, padded."""

    def __init__(self, count: int, length: int = 16) -> None:
        """Draws them."""
        self.ids = torch.randint(1, 1000, (count, length))
        self.mask = torch.arange(length) < torch.randint(4, length + 1, (count, 1))

    def __len__(self) -> int:
        """How many."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One of them."""
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index].long()}


def sentence_features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the last hidden states over the tokens that count: [B, width]."""
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(states.dtype)
    features: Tensor = (states * mask).sum(1) / mask.sum(1)
    return features


class DistillingTrainer(Trainer):
    """A Trainer whose loss is perception coherence with a teacher."""

    def __init__(self, teacher: nn.Module, **arguments: Any) -> None:
        """Takes the teacher, and what a Trainer takes."""
        super().__init__(**arguments)
        self.teacher = teacher.to(self.args.device).eval()
        self.loss_fn = pc_kernels.PerceptionCoherenceLoss(dissimilarity="cosine", temperature=1.0)
        self.model_accepts_loss_kwargs = False  # the loss is a mean, not a sum over tokens

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Where Trainer asks for it."""
        features = sentence_features(model, inputs)
        with torch.no_grad():
            target = sentence_features(self.teacher, inputs)
        loss = self.loss_fn(features, target)
        return (loss, {"features": features}) if return_outputs else loss


def encoder(width: int, layers: int) -> BertModel:
    """A small BERT; a trained one would be `BertModel.from_pretrained(...)`."""
    return BertModel(
        BertConfig(
            vocab_size=1000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=2 * width,
        )
    )


def main() -> None:
    """Trains on random sequences."""
    torch.manual_seed(0)
    teacher, student = encoder(128, layers=2), encoder(32, layers=1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=128,
            learning_rate=1e-3,
            logging_steps=5,
            dataloader_drop_last=True,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = DistillingTrainer(
            teacher, model=student, args=arguments, train_dataset=Sentences(1280)
        )
        trainer.train()


if __name__ == "__main__":
    main()
