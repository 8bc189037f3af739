import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from transformers import StaticCache

from recllm import files
from recllm.errors import UserError
from recllm.infer.transformers_engine import TransformersEngine
from recllm.model.adapter import (
    accepts_history,
    build_adapter,
    check_vocabulary,
    fit_gate_statistics,
    gate_weights,
    has_gate,
    load_adapter,
    load_weights,
    save_adapter,
)
from recllm.model.chat import answer_ids, prompt_ids
from recllm.model.soft_token import SoftToken, SoftTokenConfig, embedding_scale, first_tokens
from recllm.recipe import AdapterSection

MASK = torch.tensor([[1] * 7, [0, 0] + [1] * 5, [0] + [1] * 6])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # fp32, logits of order 10


@pytest.fixture
def soft(adapter: Any) -> Any:
    """soft(seed=0, …): a tiny Llama with a random LoRA and a random soft token."""
    return lambda seed=0, **section: adapter(seed, **{"method": "soft_token"} | section)


def _logits(model: Any, tokens: torch.Tensor, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=MASK[: len(tokens)], **given).logits


def _real(logits: torch.Tensor) -> torch.Tensor:
    return logits[MASK[: len(logits)].bool()]


def _plain_twin(model: Any, tiny_llama: Any) -> Any:
    """A stock PEFT LoRA with the same A and B."""
    twin = build_adapter(tiny_llama(), AdapterSection(method="lora", r=8, lora_alpha=16)).eval()
    layers = ([m for m in own.modules() if isinstance(m, LoraLayer)] for own in (model, twin))
    with torch.no_grad():
        for ours, theirs in zip(*layers, strict=True):
            theirs.lora_A["default"].weight.copy_(ours.lora_A["default"].weight)
            theirs.lora_B["default"].weight.copy_(ours.lora_B["default"].weight)
    return twin


# ---- what it is ----


def test_p_of_zero_is_plain_lora_exactly(
    soft: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft()
    torch.nn.init.zeros_(model.base_model.soft_token["default"].projection)
    plain = _logits(_plain_twin(model, tiny_llama), tokens)
    assert torch.equal(_logits(model, tokens, history_items=histories), plain)


def test_a_fresh_one_starts_as_the_base_model(
    soft: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    assert torch.equal(_logits(soft(trained=False), tokens, history_items=histories), _logits(tiny_llama(), tokens))


def test_an_empty_history_adds_exactly_nothing(
    soft: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft()
    plain = _logits(_plain_twin(model, tiny_llama), tokens)
    found = _logits(model, tokens, history_items=histories)
    assert torch.equal(found[2], plain[2])
    assert not torch.allclose(found[0], plain[0], atol=0.1)


def test_it_is_the_projected_representation_added_to_the_first_real_embedding(
    soft: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft()
    twin = _plain_twin(model, tiny_llama)
    token = model.base_model.soft_token["default"]
    z = (model.base_model.represent(histories) - token.mean) / token.deviation
    embeddings = twin.get_input_embeddings()(tokens)
    rms = twin.get_input_embeddings().weight.square().mean().sqrt()
    for row, column in ((0, 0), (1, 2)):  # the first real token stands behind the padding; row 2 has no history
        embeddings[row, column] += rms * (z[row] @ token.projection.T) / 16**0.5
    with torch.no_grad():
        expected = twin(inputs_embeds=embeddings, attention_mask=MASK).logits
    torch.testing.assert_close(_real(_logits(model, tokens, history_items=histories)), _real(expected), **CLOSE)


def test_with_a_projection_of_size_one_it_is_as_long_as_an_embedding() -> None:
    embedding = torch.nn.Embedding(500, 256)
    torch.nn.init.normal_(embedding.weight, std=0.02)
    token = SoftToken(64, 256, embedding_scale(embedding))
    torch.nn.init.normal_(token.projection)
    added = token(torch.randn(200, 64, generator=torch.Generator().manual_seed(0))).detach()
    assert float(added.norm(dim=1).mean() / embedding.weight.detach().norm(dim=1).mean()) == pytest.approx(1, abs=0.1)


def test_the_scale_is_that_of_what_the_embedding_gives() -> None:
    class Scaled(torch.nn.Embedding):  # as in Gemma 3
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 16

    embedding = Scaled(50, 8)
    assert embedding_scale(embedding) == pytest.approx(16 * float(embedding.weight.detach().square().mean().sqrt()))


def test_users_differ_and_standardisation_counts(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model, same = soft(), tokens[:1].expand(3, -1)
    with torch.no_grad():
        logits = model(input_ids=same, history_items=histories).logits
        assert not torch.allclose(logits[0], logits[1], atol=1e-2)
        fit_gate_statistics(model, 3 + torch.randn(50, 16))
        assert not torch.allclose(model(input_ids=same, history_items=histories).logits[0], logits[0], atol=1e-2)


# ---- where it goes ----


def test_the_first_real_token() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    tree = torch.zeros(2, 1, 3, 8)
    right = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert first_tokens(ids, {}).tolist() == [[True, False, False]] * 2
    assert first_tokens(ids, {"attention_mask": right}).tolist() == [[True, False, False]] * 2
    # padding is of no account where a mask of what is real is there, whatever its position
    left = {
        "attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1]]),
        "position_ids": torch.tensor([[0, 0, 1], [0, 0, 0]]),
    }
    assert first_tokens(ids, left).tolist() == [[False, True, False], [False, False, True]]
    # a cached step: the mask covers what is cached too
    assert not first_tokens(ids[:, :1], {"attention_mask": torch.ones(2, 5), "position_ids": torch.zeros(1, 1)}).any()
    # a tree over a prompt: it begins behind the prompt, unless the prompt has one token
    positions = torch.tensor([[4, 5, 5], [0, 1, 1]])
    assert first_tokens(ids, {"attention_mask": tree, "position_ids": positions}).tolist() == [
        [False] * 3, [True, False, False],
    ]  # fmt: skip


def test_a_representation_that_is_not_finite_is_refused(soft: Any, tokens: torch.Tensor) -> None:
    model = soft()
    representation = torch.rand(len(tokens), 16)
    representation[1, 2] = float("nan")
    for call in (model.forward, model.generate):
        with pytest.raises(UserError, match=f"representation: row 1 of {len(tokens)}"):
            call(input_ids=tokens, representation=representation)


def test_batch_equals_single_rows(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = soft()
    together = _logits(model, tokens, history_items=histories)
    for row in range(3):
        real = MASK[row].bool()
        with torch.no_grad():
            alone = model(input_ids=tokens[row : row + 1, real], history_items=histories[row : row + 1]).logits
        torch.testing.assert_close(together[row, real], alone[0], **CLOSE)


def test_cached_decoding_equals_uncached(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = soft()
    options = {"input_ids": tokens, "attention_mask": MASK, "history_items": histories, "max_new_tokens": 12}
    options |= {"do_sample": False, "eos_token_id": None}
    cached, uncached = (model.generate(use_cache=flag, **options) for flag in (True, False))
    assert torch.equal(cached, uncached)
    static = model.generate(**options, past_key_values=StaticCache(model.config, max_cache_len=32))
    assert torch.equal(static, cached)
    without = model.generate(**options | {"history_items": torch.full((3, 1), -1)})
    assert not torch.equal(without, cached)


def test_a_forward_over_kept_keys_and_values_adds_nothing_again(
    soft: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft()
    with torch.no_grad():
        first = model(input_ids=tokens[:, :4], history_items=histories, use_cache=True)
        step = model(input_ids=tokens[:, 4:], history_items=histories, past_key_values=first.past_key_values).logits
        whole = model(input_ids=tokens, history_items=histories).logits
    torch.testing.assert_close(step, whole[:, 4:], **CLOSE)


@pytest.mark.parametrize("length", [1, 7])
def test_beams_and_copies_see_their_own_users_token(
    soft: Any, tokens: torch.Tensor, histories: torch.Tensor, length: int
) -> None:
    model, prompts = soft(), tokens[:, -length:]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "num_beams": 3, "num_return_sequences": 2}
    together = model.generate(input_ids=prompts, history_items=histories, **options)
    for row in range(3):
        alone = model.generate(input_ids=prompts[row : row + 1], history_items=histories[row : row + 1], **options)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)


def test_embeddings_in_place_of_ids(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = soft()
    with torch.no_grad():
        embeddings = model.get_base_model().model.embed_tokens.weight[tokens]
        found = model(inputs_embeds=embeddings, attention_mask=MASK, history_items=histories).logits
    assert torch.equal(found, _logits(model, tokens, history_items=histories))


# ---- the engine that scores and generates ----

PROMPTS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "user", "content": "list"}, {"role": "assistant", "content": "Heat\nSpeed\n"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a prompt that is much longer"}],
]
ANSWERS = [["Heat", "Heat 2", "X"], ["Heat\n", "Heat 2\n", "Up\n"], ["H", "He", "Heap"]]
HISTORIES = [np.array([1, 2, 3]), np.array([], dtype=np.int32), np.array([7])]


@torch.no_grad()
def _one_by_one(model: Any, tokenizer: Any, prompt: Any, answer: str, history: Any) -> float:
    begin, end = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, answer)
    items = torch.tensor([[-1, *history.tolist()]])
    logits = model(input_ids=torch.tensor([begin + end]), history_items=items).logits[0, len(begin) - 1 : -1]
    return logits.double().log_softmax(-1)[torch.arange(len(end)), torch.tensor(end)].sum().item()


def test_scores_equal_one_full_forward_for_each_answer(soft: Any, tiny_tokenizer: Any) -> None:
    model = soft()
    expected = [
        [_one_by_one(model, tiny_tokenizer, prompt, answer, history) for answer in answers]
        for prompt, answers, history in zip(PROMPTS, ANSWERS, HISTORIES)
    ]
    for share in (True, False):
        scores = TransformersEngine(model, tiny_tokenizer, 2, share).score(PROMPTS, ANSWERS, HISTORIES)
        assert scores == pytest.approx(np.array(expected), abs=1e-4), f"share_prompts={share}"
    swapped = TransformersEngine(model, tiny_tokenizer, 3).score(PROMPTS, ANSWERS, HISTORIES[::-1])
    assert np.abs(swapped - np.array(expected)).max() > 0.1


@pytest.mark.parametrize("others", [[], [2]])
def test_prompts_of_one_token(
    soft: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, others: list[int]
) -> None:
    """A prompt that is all root of its trie: nothing of it is read in the first forward."""
    model = soft()
    module = "recllm.infer.tokens.prompt_ids"
    monkeypatch.setattr(module, lambda tokenizer, prompt: ids[prompt[0]["content"]])
    ids = {"hello": [5], "be brief": [9, 8, 7]}
    rows = [0, *others]
    picked = [[values[i] for i in rows] for values in (PROMPTS, ANSWERS, HISTORIES)]
    shared, separate = (TransformersEngine(model, tiny_tokenizer, 2, share).score(*picked) for share in (True, False))
    assert shared == pytest.approx(separate, abs=1e-4)
    nobody = TransformersEngine(model, tiny_tokenizer, 2).score(picked[0], picked[1], [np.array([])] * len(rows))
    assert np.abs(nobody[0] - shared[0]).max() > 1e-2  # it was there


def test_generation_is_the_same_for_single_rows_and_a_padded_batch(soft: Any, tiny_tokenizer: Any) -> None:
    model = soft()
    together = TransformersEngine(model, tiny_tokenizer, 3).generate(PROMPTS, HISTORIES, max_new_tokens=12)
    engine = TransformersEngine(model, tiny_tokenizer, 1)
    assert together == [engine.generate([p], [h], max_new_tokens=12)[0] for p, h in zip(PROMPTS, HISTORIES)]


# ---- training ----


def test_the_projection_has_a_gradient_from_the_first_step_on(
    soft: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft(trained=False).train()
    model(input_ids=tokens, attention_mask=MASK, labels=tokens, history_items=histories).loss.backward()
    assert model.base_model.soft_token["default"].projection.grad.abs().max() > 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "base_model.soft_token.default.projection" in trained
    assert all("lora_" in name or "soft_token" in name for name in trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_stays_finite(
    tiny_llama: Any, encoder: Any, tokens: torch.Tensor, histories: torch.Tensor, dtype: torch.dtype
) -> None:
    # small embeddings, as of a real model: a soft token of its own that starts at zero ends in NaN here
    base_model = tiny_llama(initializer_range=0.02).to(dtype)
    model = build_adapter(base_model, AdapterSection(method="soft_token"), encoder()).train()
    fit_gate_statistics(model, encoder()(torch.arange(20)[:, None]).detach())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, attention_mask=MASK, labels=tokens, history_items=histories).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    token = model.base_model.soft_token["default"]
    assert token.projection.dtype == torch.float32
    added = token(model.base_model.represent(histories[:2])).norm(dim=1)
    length = base_model.get_input_embeddings().weight.float().norm(dim=1).mean()
    assert 0.01 < float((added / length).mean()) < 5


def test_checkpointing_on_equals_off(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model, gradients = soft().train(), []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert any("soft_token" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_an_encoder_can_be_trained_along(
    soft: Any, encoder: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft()
    model.train()
    assert not model.base_model.sequence_encoder["default"].training  # frozen: no dropout
    model.base_model.set_encoder(encoder(dropout=0.0), "default", trainable=True)
    model.train()(input_ids=tokens, labels=tokens, history_items=histories).loss.backward()
    assert model.base_model.sequence_encoder["default"].item_embedding.weight.grad.abs().max() > 0


# ---- files ----


@pytest.mark.parametrize("name", ["default", "other"])
def test_saved_and_loaded_under_any_name_gives_the_same_logits(
    soft: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor, name: str
) -> None:
    model = soft()
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(tiny_llama(), tmp_path / "adapter", adapter_name=name)
    assert torch.equal(
        _logits(loaded, tokens, history_items=histories), _logits(model, tokens, history_items=histories)
    )
    assert not any(p.requires_grad for p in loaded.parameters())
    files_there = {str(f.relative_to(tmp_path / "adapter")) for f in (tmp_path / "adapter").rglob("*.*")}
    assert files_there == {
        "adapter_model.safetensors", "adapter_config.json", "base_model.json", "soft_token.safetensors",
        "soft_token.json", "sequence_encoder/encoder.safetensors", "sequence_encoder/encoder.json",
    }  # fmt: skip
    save_adapter(loaded, tmp_path / "again", adapter_name=name)
    assert files.sha256_of(tmp_path / "again") == files.sha256_of(tmp_path / "adapter")


def test_weights_load_in_place(soft: Any, tmp_path: Path, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model, wanted = soft(seed=5), soft()
    save_adapter(wanted, tmp_path / "adapter")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    load_weights(model, tmp_path / "adapter")
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert torch.equal(
        _logits(model, tokens, history_items=histories), _logits(wanted, tokens, history_items=histories)
    )


def test_stock_peft_loads_the_lora_without_the_token(
    soft: Any, tiny_llama: Any, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = soft()
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    assert torch.equal(_logits(stock, tokens), _logits(model, tokens, history_items=torch.full((3, 1), -1)))


@pytest.mark.parametrize("name", ["soft_token.safetensors", "soft_token.json", "sequence_encoder/encoder.safetensors"])
def test_truncated_and_missing_files(soft: Any, tiny_llama: Any, tmp_path: Path, name: str) -> None:
    save_adapter(soft(), tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=path.name):
        load_adapter(tiny_llama(), tmp_path / "adapter")
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        load_adapter(tiny_llama(), tmp_path / "adapter")


def test_a_lost_encoder_is_said(soft: Any, tiny_llama: Any, tmp_path: Path) -> None:
    save_adapter(soft(), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter" / "sequence_encoder")
    with pytest.raises(UserError, match=r"sequence_encoder does not exist: the adapter was trained on"):
        load_adapter(tiny_llama(), tmp_path / "adapter")


def test_another_vocabulary_and_format(soft: Any, tiny_llama: Any, tmp_path: Path) -> None:
    model = soft()
    model.base_model.sequence_encoder["default"].vocabulary_sha256 = "v" * 64
    save_adapter(model, tmp_path / "adapter")
    check_vocabulary(tmp_path / "adapter", "v" * 64)
    with pytest.raises(UserError, match="wwww"):
        check_vocabulary(tmp_path / "adapter", "w" * 64)
    path = tmp_path / "adapter" / "soft_token.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(UserError, match="format_version is 2"):
        load_adapter(tiny_llama(), tmp_path / "adapter")


# ---- a citizen of PEFT ----


def test_disabled_it_is_the_base_model(
    soft: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model, base = soft(), _logits(tiny_llama(), tokens)
    with model.disable_adapter():
        assert torch.equal(_logits(model, tokens), base)
        assert torch.equal(_logits(model, tokens, history_items=histories), base)
    assert not torch.allclose(_logits(model, tokens, history_items=histories), base)


def test_two_adapters_in_one_model(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    alone = [_logits(soft(seed=s), tokens, history_items=histories) for s in (0, 5)]
    both = soft(seed=5, name="second", base_model=soft(seed=0, name="first"))
    for name, expected in zip(("first", "second", "first"), (alone[0], alone[1], alone[0])):
        both.set_adapter(name)
        assert torch.equal(_logits(both, tokens, history_items=histories), expected)
        trained = [key for key, p in both.named_parameters() if p.requires_grad]
        assert any("soft_token" in key for key in trained)
        assert all(f".{name}." in key for key in trained)
    both.delete_adapter("first")
    assert list(both.base_model.soft_token) == list(both.base_model.sequence_encoder) == ["second"]
    assert torch.equal(_logits(both, tokens, history_items=histories), alone[1])


def test_a_copy_has_its_own_token(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = soft()
    expected = _logits(model, tokens, history_items=histories)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.base_model.soft_token["default"].projection)
    assert torch.equal(_logits(twin, tokens, history_items=histories), expected)


def test_unloaded_it_is_the_base_model_again(
    soft: Any, tiny_llama: Any, tokens: torch.Tensor, histories: torch.Tensor
) -> None:
    model = soft()
    with pytest.raises(UserError, match="cannot be merged"):
        model.merge_and_unload()
    assert torch.equal(_logits(model.unload(), tokens), _logits(tiny_llama(), tokens))


def test_compiled_without_a_graph_break(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = soft()
    representation = model.base_model.represent(histories)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = _logits(model, tokens, representation=representation)
    torch.testing.assert_close(_logits(compiled, tokens, representation=representation), expected, **CLOSE)
    swapped = _logits(model, tokens, representation=representation.flip(0))
    torch.testing.assert_close(_logits(compiled, tokens, representation=representation.flip(0)), swapped, **CLOSE)


# ---- asked and refused ----


def test_what_it_answers(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    model = soft()
    assert accepts_history(model)
    assert not has_gate(model)
    with pytest.raises(ValueError, match="no gate"):
        gate_weights(model, histories)
    with pytest.raises(ValueError, match="no gate: pass one of history_items, representation"):
        model(input_ids=tokens, gate_weights=torch.rand(3, 4))
    with pytest.raises(ValueError, match="pass one of"):
        model(input_ids=tokens, history_items=histories, representation=torch.rand(3, 16))
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        model(input_ids=tokens, representation=torch.rand(3, 5))
    for call in (model.forward, model.generate):
        with pytest.raises(RuntimeError, match="history_items= or representation="):
            call(input_ids=tokens)


def test_packed_rows_are_refused(soft: Any, tokens: torch.Tensor, histories: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="one row for each of 3"):
        soft()(input_ids=tokens.reshape(1, -1), history_items=histories)
    with pytest.raises(RuntimeError, match="packed"):
        soft()(input_ids=tokens[:1], history_items=histories[:1], cu_seq_lens_q=torch.tensor([0, 3, 7]))
    with pytest.raises(RuntimeError, match="position_ids of row 0 of 1 begin anew"):
        soft()(input_ids=tokens[:1], history_items=histories[:1], position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))


def test_what_the_config_refuses(tiny_llama: Any, encoder: Any) -> None:
    for options in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1]}):
        with pytest.raises(UserError, match=next(iter(options))):
            SoftTokenConfig(target_modules=["q_proj"], **options)
    with pytest.raises(UserError, match="input embedding"):
        build_adapter(
            tiny_llama(), AdapterSection(method="soft_token", target_modules=["embed_tokens", "q_proj"]), encoder()
        )
    with pytest.raises(UserError, match="sequence encoder"):
        build_adapter(tiny_llama(), AdapterSection(method="soft_token"))
    model = get_peft_model(tiny_llama(), SoftTokenConfig(target_modules=["q_proj"], representation_size=16))
    with pytest.raises(UserError, match="8 numbers a user, the soft token reads 16"):
        model.base_model.set_encoder(encoder(hidden_size=8), "default")


def test_gathered_weights_are_saved_in_place_of_the_models(soft: Any, tmp_path: Path) -> None:
    save_adapter(soft(), tmp_path / "own")
    save_adapter(soft(seed=5), tmp_path / "gathered", state_dict=soft().state_dict())
    for name in ("adapter_model.safetensors", "soft_token.safetensors", "sequence_encoder/encoder.safetensors"):
        assert (tmp_path / "gathered" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_built_on_meta_it_is_loaded_over(soft: Any, tiny_llama: Any, tokens: torch.Tensor) -> None:
    config = SoftTokenConfig(target_modules=["q_proj"], representation_size=16)
    model = get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    token = model.base_model.soft_token["default"]
    assert token.projection.is_meta
    assert not token.scale.is_meta


@pytest.mark.slow
def test_training_on_smollm2_stays_finite_and_near_the_embeddings_length(smollm2: str, encoder: Any) -> None:
    from recllm.model.base_model import load_base_model
    from recllm.recipe import ModelSection

    base_model, tokenizer = load_base_model(ModelSection(name_or_path=smollm2))
    model = build_adapter(base_model, AdapterSection(method="soft_token"), encoder()).train()
    fit_gate_statistics(model, encoder()(torch.arange(20)[:, None]).detach())
    prompt = [{"role": "user", "content": "Which film next after Heat (1995)?"}]
    ids = torch.tensor([prompt_ids(tokenizer, prompt) + answer_ids(tokenizer, "Alien (1979)")])
    given = {"history_items": torch.tensor([[1, 2, 3]])}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids, **given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    added = model.base_model.tokens(history_items=given["history_items"]).norm()
    length = base_model.get_input_embeddings().weight.float().norm(dim=1).mean()
    assert 0.01 < float((added / length).detach()) < 3
