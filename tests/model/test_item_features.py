from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recllm.errors import UserError
from recllm.model import item_features as module
from recllm.model.base_model import load_base_model, load_tokenizer
from recllm.model.item_features import FEATURES, item_features, load_or_compute
from recllm.model.sequence_encoder import load_encoder, make_encoder, save_encoder
from recllm.recipe import EncoderSection, ModelSection

TEXTS = ["Heat", "Alien (1979)", "Heat", "Twelve Monkeys, the one with the long title", "M"]


@pytest.fixture
def section(tiny_model_folder: Path) -> ModelSection:
    return ModelSection(name_or_path=str(tiny_model_folder), dtype="float32")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of texts of each time that features were really computed."""
    calls: list[int] = []
    real = module.item_features

    def counting(model: Any, tokenizer: Any, texts: Any, batch_size: int = 64) -> torch.Tensor:
        calls.append(len(texts))
        return real(model, tokenizer, texts, batch_size)

    monkeypatch.setattr(module, "item_features", counting)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_are_the_mean_of_the_last_hidden_states_of_the_text(tiny_llama, tiny_tokenizer, batch_size) -> None:
    model = tiny_llama()
    found = item_features(model, tiny_tokenizer, TEXTS, batch_size)
    assert (found.shape, found.dtype) == ((5, 32), torch.float32)
    for text, row in zip(TEXTS, found):
        ids = [tiny_tokenizer.bos_token_id, *tiny_tokenizer(text, add_special_tokens=False)["input_ids"]]
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row, states[1:].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[2])  # not merely close: equal texts are one item to the encoder


def test_a_text_without_tokens_has_the_mean_of_the_others(tiny_llama, tiny_tokenizer) -> None:
    found = item_features(tiny_llama(), tiny_tokenizer, ["Heat", "", "Alien"])
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)
    assert torch.equal(item_features(tiny_llama(), tiny_tokenizer, [""]), torch.zeros(1, 32))


def test_a_very_long_text_is_cut(tiny_llama, tiny_tokenizer) -> None:
    found = item_features(tiny_llama(), tiny_tokenizer, ["a" * 5000, "a" * module.MAX_TOKENS])
    torch.testing.assert_close(found[0], found[1])


def test_features_that_are_not_finite_name_their_text(tiny_llama, tiny_tokenizer) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("inf")
    with pytest.raises(UserError, match=r'"Heat".*not finite'):
        item_features(model, tiny_tokenizer, ["Heat"])


def test_they_are_computed_once_for_the_same_texts_and_weights(tmp_path, section, computed) -> None:
    folder = tmp_path / "item_features"
    first = load_or_compute(section, TEXTS, folder)
    assert torch.equal(load_or_compute(section, TEXTS, folder), first)
    assert computed == [5]
    other = load_or_compute(section, [*TEXTS[:4], "N"], folder)
    assert computed == [5, 5]
    assert torch.equal(other[:4], first[:4])
    assert not torch.allclose(other[4], first[4])
    load_or_compute(section, TEXTS[::-1], folder)
    assert computed == [5, 5, 5]  # the order is the vocabulary's


def test_other_weights_of_the_same_sizes_have_other_features(tmp_path, section, computed, tiny_llama) -> None:
    folder = tmp_path / "item_features"
    first = load_or_compute(section, TEXTS, folder)
    load_tokenizer(section.name_or_path).save_pretrained(tmp_path / "model")
    tiny_llama(seed=1).save_pretrained(tmp_path / "model")
    other = ModelSection(name_or_path=str(tmp_path / "model"), dtype="float32")
    assert not torch.allclose(load_or_compute(other, TEXTS, folder), first)
    assert len(computed) == 2


def test_a_damaged_folder_is_made_again(tmp_path, section, computed, capsys) -> None:
    folder = tmp_path / "item_features"
    first = load_or_compute(section, TEXTS, folder)
    path = folder / FEATURES
    path.write_bytes(path.read_bytes()[:50])
    assert torch.equal(load_or_compute(section, TEXTS, folder), first)
    assert len(computed) == 2
    assert "computing the item features again" in capsys.readouterr().err
    assert torch.equal(load_file(path)["features"], first)


def test_weights_without_a_fingerprint_are_not_remembered(tmp_path, section, computed, monkeypatch) -> None:
    monkeypatch.setattr(module, "weights_sha256", lambda _: None)
    load_or_compute(section, TEXTS, tmp_path / "item_features")
    load_or_compute(section, TEXTS, tmp_path / "item_features")
    assert len(computed) == 2
    assert not (tmp_path / "item_features").exists()


def test_the_encoder_is_whole_without_the_folder_and_the_base_model(tmp_path, section) -> None:
    features = load_or_compute(section, TEXTS, tmp_path / "item_features")
    encoder = make_encoder(EncoderSection(type="content", hidden_size=8), 5, 6, features).eval()
    save_encoder(encoder, tmp_path / "encoder", "abc", {})
    loaded, _ = load_encoder(tmp_path / "encoder")
    items = torch.tensor([[0, 1, 4]])
    assert torch.equal(loaded(items), encoder(items))
    assert torch.equal(loaded.item_embedding.weight[0], loaded.item_embedding.weight[2])


@pytest.mark.slow
def test_a_real_model_puts_like_titles_side_by_side(smollm2) -> None:
    model, tokenizer = load_base_model(ModelSection(name_or_path=smollm2))
    titles = ["Star Wars", "Star Trek", "Toy Story", "Toy Story 2", "Alien", "Aliens", "The Godfather", "Fargo"]
    features = item_features(model, tokenizer, titles)
    embedding = make_encoder(EncoderSection(type="content"), 8, 6, features).item_embedding
    near = torch.nn.functional.normalize(embedding.features.float(), dim=1)
    cosine = (near @ near.T).fill_diagonal_(-1)
    assert cosine.argmax(1)[:6].tolist() == [1, 0, 3, 2, 5, 4]
