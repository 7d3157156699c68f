"""sentence-transformers: the labels are the teacher's embeddings, as for its MSELoss; widths may differ.

`python examples/sentence_transformers_loss.py` runs it.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import pc_kernels

WORDS = [f"word{number}" for number in range(200)]


class TeacherOrderLoss(nn.Module):
    """Sentences are ordered around each sentence as the teacher's embeddings, the labels, say."""

    def __init__(self, model: SentenceTransformer, **options: Any) -> None:
        """Takes the student and the options of `PerceptionCoherenceLoss`."""
        super().__init__()
        self.model = model
        self.loss_fn = pc_kernels.PerceptionCoherenceLoss(dissimilarity="cosine", **options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The mean over the columns of sentences, each of which has the same labels."""
        losses = [
            self.loss_fn(self.model(features)["sentence_embedding"], labels.float())
            for features in sentence_features
        ]
        return torch.stack(losses).mean()


def bag_of_words(width: int) -> SentenceTransformer:
    """A model without weights to download."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=width)], device="cpu"
    )


def main() -> None:
    """Trains a bag of words from a wider one."""
    random.seed(0)
    torch.manual_seed(0)
    teacher, student = bag_of_words(128), bag_of_words(32)
    sentences = [" ".join(random.choices(WORDS, k=6)) for _ in range(1280)]
    embeddings = teacher.encode(sentences, show_progress_bar=False)
    data = Dataset.from_dict({"sentence": sentences, "label": embeddings.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=4,
            per_device_train_batch_size=128,
            learning_rate=3e-2,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        SentenceTransformerTrainer(
            model=student, args=arguments, train_dataset=data, loss=TeacherOrderLoss(student)
        ).train()
    found = pc_kernels.coherence(
        torch.from_numpy(student.encode(sentences[:256], show_progress_bar=False)),
        torch.from_numpy(embeddings[:256]),
        dissimilarity="cosine",
    )
    print(f"Spearman's correlation with the teacher: {found.spearman.item():.3f}")


if __name__ == "__main__":
    main()
