"""Documents in a window are kept apart, shown here by other means than the library's own trial; and the proof that
labels are aligned, on a model that has learned something."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from llm_recipes.config import ModelConfig, ParallelConfig
from llm_recipes.errors import UserError

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "qwen3": ("qwen3_tied", {}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    # Positions: absolute and learned, as the model counts them itself; ALiBi; absolute; none.
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "gpt2": ("gpt2", {"num_hidden_layers": None, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
    # What recurrent layers carry along no mask of attention stops.
    "mamba": ("mamba", {"state_size": 4}),
    "jamba": ("jamba", {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "mamba_d_state": 4}),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 32, "head_dim": 8, "attention_window_size": 16,
                                            "num_hidden_layers": 3}),
}  # fmt: skip
LEAKING = ["opt", "gpt2", "bloom", "falcon", "mpt", "mamba", "jamba", "recurrent_gemma"]
LENGTHS = [11, 17, 6]
"""Targets of the three documents of a window of 40: padding follows."""


def save(folder: Path, family: str, **changes: Any) -> Path:
    name, own = FAMILIES[family]
    return tiny.save_model(folder, name, **own, **changes)


def packed(*documents: list[int], separate: bool = True) -> dict[str, torch.Tensor]:
    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack

    return stack([window([torch.tensor(each).numpy() for each in documents], 40, separate)])


def documents(*seeds: int) -> list[list[int]]:
    """One of each length; another seed is another document without a token in common."""
    return [
        [(5 + 7 * i + 31 * number + 64 * seed) % 256 for i in range(length + 1)]
        for number, (length, seed) in enumerate(zip(LENGTHS, seeds, strict=True))
    ]


def open_model(folder: str, attention: str = "auto", **overrides: Any) -> Any:
    from llm_recipes.models import causal, topology

    parallel = ParallelConfig(precision="fp32")
    config = ModelConfig(path=folder, attention=attention, overrides=overrides)
    lm = causal.build(config, parallel, topology.start(parallel), folder, mask_documents=True, seed=0)
    lm.model.eval()
    return lm


def differences(lm: Any, separate: bool = True) -> dict[str, float]:
    """How much a document's logits change with another document, and with its place in the window; and how much the
    loss of the last two depends on the first one's embeddings."""
    with torch.no_grad():
        usual = lm.logits(packed(*documents(0, 0, 0), separate=separate))[0]
        other_first = lm.logits(packed(*documents(1, 0, 0), separate=separate))[0]
        other_second = lm.logits(packed(*documents(0, 1, 0), separate=separate))[0]
        other_last = lm.logits(packed(*documents(0, 0, 1), separate=separate))[0]
        alone = [lm.logits(packed(each, separate=separate))[0] for each in documents(0, 0, 0)]
    places = first, second, third = slice(0, 11), slice(11, 28), slice(28, 34)

    def far(one: torch.Tensor, two: torch.Tensor) -> float:
        return float((one - two).abs().max())

    reached = []
    hook = lm.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: reached.append(output.requires_grad_()) or output
    )
    batch = packed(*documents(0, 0, 0), separate=separate)
    (gradient,) = torch.autograd.grad(lm.token_losses(batch)[0][0, 11:34].sum(), reached[0])
    hook.remove()
    return {
        "later": max(far(usual[11:34], other_first[11:34]), far(usual[third], other_second[third])),
        "earlier": max(far(usual[first], other_second[first]), far(usual[:28], other_last[:28])),
        "itself": min(far(usual[first], other_first[first]), far(usual[second], other_second[second])),
        "alone": max(far(usual[at], each[: at.stop - at.start]) for at, each in zip(places, alone, strict=True)),
        "gradient": float(gradient[0, :11].abs().max()),
        "own_gradient": float(gradient[0, 11:34].abs().max()),
    }  # fmt: skip


def isolated(folders: list[tuple[str, str]]) -> list[Any]:
    """For each model and attention the way that was found, with the differences there, or what was said."""
    from llm_recipes.training import proofs

    found: list[Any] = []
    for folder, attention in folders:
        try:
            lm = open_model(folder, attention)
            proofs.isolate_documents(lm, True)
        except UserError as error:
            found.append(str(error))
        else:
            found.append((lm.masking.way, differences(lm)))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def assert_isolated(found: dict[str, float], where: str) -> None:
    assert found["later"] == 0 and found["gradient"] == 0, f"{where}: a document sees the one before it, {found}"
    assert found["earlier"] == 0, f"{where}: it sees the one after it, {found}"
    assert found["alone"] < 1e-4, f"{where}: it is not what it is alone, {found}"
    assert found["itself"] > 1e-2 and found["own_gradient"] > 1e-4, f"{where}: this shows nothing, {found}"


def test_a_document_does_not_see_the_one_before_it(ranks: Any, folders: Any) -> None:
    """Bitwise, and for each attention."""
    cases = [(family, attention) for family in ("mistral", "qwen3") for attention in ("sdpa", "eager")]
    cases.append(("gemma2", "eager"))  # The only attention that caps its scores; every other layer has a window.
    (answers,) = ranks(1, isolated, [(str(folders[family]), attention) for family, attention in cases])
    for case, answer in zip(cases, answers, strict=True):
        assert not isinstance(answer, str), answer
        assert answer[0] == "own"
        assert_isolated(answer[1], str(case))


def test_a_model_that_leaks_is_masked_another_way_or_refused_with_the_choice(ranks: Any, folders: Any) -> None:
    """Two ranks, which must come to the same end."""
    answers = ranks(2, isolated, [(str(folders[family]), "auto") for family in LEAKING])
    refused = []
    for family, one, two in zip(LEAKING, *answers, strict=True):
        if isinstance(one, str):
            refused.append(family)
            assert one == two and "\n" not in one
            assert "data.mask_documents=true" in one and family in one, one
            assert "set data.mask_documents=false" in one
        else:
            for way, found in (one, two):
                assert way == one[0]
                assert_isolated(found, f"{family} by {way}")
    assert set(refused) >= {"mamba", "jamba", "recurrent_gemma"}, "no mask stops a recurrent state"
    assert set(LEAKING) - set(refused) >= {"opt", "mpt"}, "a mask is enough where positions are not"


def leaks(folder: str) -> dict[str, float]:
    """The differences that the usual way leaves in a model for which it does not work."""
    return differences(open_model(folder))


def test_a_leak_is_seen_by_the_means_used_here(ranks: Any, folders: Any) -> None:
    found = ranks(1, leaks, str(folders["opt"]))[0]
    assert found["later"] > 1e-2 and found["gradient"] > 1e-4 and found["alone"] > 1e-2
    assert found["earlier"] == 0, "it is still causal"


def test_a_faint_leak_is_one_too_and_numeric_noise_is_none() -> None:
    """In bf16 a document differs from itself alone by rounding: that cannot show what a leak shows."""
    from llm_recipes.models.masking import Isolation

    for dtype, rounding in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        assert Isolation(leak=0, noise=0, apart=rounding).holds(dtype)
        assert Isolation(leak=3e-7, noise=1e-7, apart=rounding).holds(dtype), "some experts differ with the batch"
        assert not Isolation(leak=1e-3, noise=0, apart=rounding).holds(dtype)
        assert not Isolation(leak=1e-3, noise=1e-7, apart=rounding).holds(dtype)
        assert not Isolation(leak=0, noise=0, apart=0.3).holds(dtype), "its positions do not restart"
    assert not Isolation(leak=0, noise=0, apart=1e-2).holds(torch.float32)
    assert not Isolation(leak=float("nan"), noise=0, apart=0).holds(torch.float32)


def reach(folder: str, attention: str) -> torch.Tensor:
    """How much the logits of each place depend on the first token of a single document of 30."""
    from llm_recipes.training import proofs

    # One layer: two would see twice as far.
    lm = open_model(folder, attention, num_hidden_layers=1, sliding_window=8)
    proofs.isolate_documents(lm, True)
    one, two = [3, *range(30)], [200, *range(30)]
    with torch.no_grad():
        return (lm.logits(packed(one)) - lm.logits(packed(two)))[0].abs().amax(-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_sliding_window_stays_where_documents_are_masked(ranks: Any, folders: Any, attention: str) -> None:
    (changed,) = ranks(1, reach, str(folders["mistral"]), attention)
    assert bool((changed[:8] > 0).all()), "what is inside the window is seen"
    assert not changed[8:].any(), "and nothing that lies before it"


def by_mask(folder: str, way: str) -> dict[str, Any]:
    """Under an explicit mask: a long document's logits with the model's own attention and with ours, and the leak."""
    from dataclasses import replace

    from llm_recipes.data.documents import window
    from llm_recipes.data.stream import stack
    from llm_recipes.models import masking

    lm = open_model(folder)
    ways = masking.ways_to_try(lm.model, lm.masking.accepts)
    batch = stack([window([np.arange(40) % 251], 39, True)])
    with lm.evaluating():
        own = lm.logits(batch, replace(lm.masking, way="none"))
        ours = lm.logits(batch, replace(lm.masking, way=way))
        candidate = replace(lm.masking, way=way)
        found = masking.try_masking(
            lambda each: lm.logits(each, candidate),
            lambda each: lm.logits(each, replace(candidate, way="none")),
            lm.vocabulary,
            lm.topology.device,
        )
    return {"ways": ways, "apart": float((own - ours).abs().max()), "leak": found.leak, "noise": found.noise}


@pytest.mark.parametrize(
    ("family", "way", "changes"),
    [
        ("mistral", "block", {}),
        ("mistral", "block", {"sliding_window": 8}),
        ("gemma2", "layers", {"sliding_window": 8}),
        ("gpt_oss", "layers", {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    ],
)
def test_an_explicit_mask_keeps_the_model_s_own_window(
    ranks: Any, tmp_path: Path, family: str, way: str, changes: dict[str, Any]
) -> None:
    """It is all the masking there is: without the window the model would train with another attention than its own."""
    folder = tiny.save_model(tmp_path / "model", family, **changes)
    [found] = ranks(1, by_mask, str(folder), way)
    assert found["ways"] == ["own", "positions", way]
    assert found["apart"] < 1e-4
    assert found["leak"] <= 10 * found["noise"]


OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen3": ("qwen3_tied", {}),
    "mixtral": ("mixtral", {}),
    "gemma3": ("gemma3_text", {"head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6}),
}  # fmt: skip


def own_and_found(folder: str, attention: str) -> float:
    """How far the logits under masks of document numbers are from those that the model itself makes of positions."""
    from dataclasses import replace

    lm = open_model(folder, attention)
    with torch.no_grad():
        logits = [
            lm.logits(packed(*documents(0, 1, 0)), replace(lm.masking, way=way)) for way in ("own", "positions", "none")
        ]
    assert not torch.equal(logits[0], logits[2]), "else this shows nothing"
    return float((logits[0] - logits[1]).abs().max())


@pytest.mark.parametrize(
    ("attention", "families"),
    [
        ("sdpa", list(OWN)),
        ("eager", list(OWN)),
        # transformers compiles it for each model; on a CPU it has no backward pass.
        pytest.param("flex_attention", ["mistral"], marks=pytest.mark.slow),
    ],
)
def test_masks_of_document_numbers_are_those_that_the_model_finds_in_positions(
    ranks: Any, tmp_path: Path, attention: str, families: list[str]
) -> None:
    """Of full attention and of windows; to the last bit, but for flex attention's order of sums."""
    for name in families:
        family, changes = OWN[name]
        folder = tiny.save_model(tmp_path / name, family, **changes)
        (far,) = ranks(1, own_and_found, str(folder), attention)
        assert far <= (1e-5 if attention == "flex_attention" else 0), name


def test_chunks_of_attention_which_begin_anew_in_each_document_are_left_to_positions() -> None:
    from llm_recipes.models import loading, masking

    changes = {"num_local_experts": 4, "head_dim": 8, "attention_chunk_size": 8}
    model = loading.empty_model(tiny.model_config("llama4_text", **changes), torch.float32, None)
    assert masking.ways_to_try(model, masking.accepted_arguments(model)) == ["positions", "block"]


@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_window_left_over_in_a_configuration_is_not_given_to_layers_that_have_none(family: str) -> None:
    """transformers would make its masks; a trial on documents that are shorter than it would not show that."""
    from llm_recipes.models import loading, masking

    model = loading.empty_model(tiny.model_config(family, sliding_window=40), torch.float32, None)
    assert model.config.sliding_window == 40
    assert masking.ways_to_try(model, masking.accepted_arguments(model)) == ["positions", "block"]


def unmasked(folder: str) -> dict[str, Any]:
    from llm_recipes.training import proofs

    lm = open_model(folder)
    lm.masking = type(lm.masking)("none", lm.masking.accepts, lm.masking.dtype)
    proofs.isolate_documents(lm, False)
    batch = packed(*documents(0, 0, 0), separate=False)
    with torch.no_grad():
        logits = lm.logits(batch)[0]
    return {"way": lm.masking.way, "logits": logits, **differences(lm, separate=False)}


def test_without_masking_one_attention_runs_over_the_whole_window(ranks: Any, folders: Any) -> None:
    """It is the plain model on one long text, and no proof stands in its way: mamba trains so."""
    from transformers import AutoModelForCausalLM

    for family in ("mistral", "mamba"):
        (found,) = ranks(1, unmasked, str(folders[family]))
        assert found["way"] == "none"
        assert found["later"] > 1e-3 and found["gradient"] > 0, "a document sees the ones before it"
        assert found["earlier"] == 0
        model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
        ids = packed(*documents(0, 0, 0), separate=False)["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(found["logits"], model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-4)


def test_the_choice_of_attention_has_a_reason() -> None:
    from types import SimpleNamespace
    from unittest.mock import patch

    from llm_recipes.models import causal

    model = SimpleNamespace(_supports_flash_attn=True, config=SimpleNamespace(_attn_implementation="sdpa"))
    none = SimpleNamespace(_supports_flash_attn=False)
    cuda, cpu, bf16, fp32 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16, torch.float32
    there = {"is_flash_attn_3_available": lambda: False, "is_flash_attn_2_available": lambda: True}
    with patch.multiple(causal, **there):
        assert causal.flash_attention(model, cuda, bf16) == ("flash_attention_2", "installed here")
        for asked, reason in (
            ((model, cpu, bf16), "GPU"),
            ((model, cuda, fp32), "fp32"),
            ((none, cuda, bf16), "model"),
        ):
            name, why = causal.flash_attention(*asked)
            assert name is None and reason in why
    there = {"is_flash_attn_3_available": lambda: False, "is_flash_attn_2_available": lambda: False}
    with patch.multiple(causal, **there), patch("llm_recipes.models.varlen.why_not", lambda *_: "a reason"):
        name, why = causal.flash_attention(model, cuda, bf16)
        assert name is None and "not installed" in why and "a reason" in why
    assert causal._attention(model, cpu, "why") == "attention sdpa (why)"
    with patch("torch.backends.cuda.flash_sdp_enabled", lambda: False):
        said = causal._attention(model, cuda, "why")
    assert "cuDNN" in said and "efficient" in said and "flash" not in said


def test_a_block_mask_lets_a_token_see_its_own_document_up_to_itself() -> None:
    from llm_recipes.models.masking import block_mask

    for dtype in (torch.float32, torch.bfloat16):
        mask = block_mask(torch.tensor([[0, 0, 1, 1, 1, 2]]), dtype)
        assert mask.shape == (1, 1, 6, 6) and mask.dtype == dtype
        seen = [[0], [0, 1], [2], [2, 3], [2, 3, 4], [5]]
        for row, columns in enumerate(seen):
            assert (mask[0, 0, row] == 0).nonzero().flatten().tolist() == columns
        assert bool(torch.isfinite(mask).all()), "a row of minus infinity would be NaN"


def noisy_cycle(seed: int, rows: int, length: int, noise: float) -> list[list[int]]:
    """1, 2, 3, 4, 1 ... in which a step now and then goes anywhere among the four."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(rows):
        row = [1]
        for _ in range(length):
            step = 1
            if float(torch.rand((), generator=generator)) < noise:
                step = int(torch.randint(4, (), generator=generator))
            row.append((row[-1] - 1 + step) % 4 + 1)
        made.append(row)
    return made


def judged(folder: str, steps: int) -> dict[str, str]:
    """What the proof of alignment says of a model after some training, for right targets and wrong ones."""
    from llm_recipes.data.documents import IGNORE, window
    from llm_recipes.data.stream import stack
    from llm_recipes.training import proofs

    lm = open_model(folder)
    adamw = torch.optim.AdamW(lm.model.parameters(), lr=1e-2)

    def batch(seed: int, noise: float = 0.4) -> dict[str, torch.Tensor]:
        return stack([window([torch.tensor(row).numpy()], 24, True) for row in noisy_cycle(seed, 8, 24, noise)])

    for number in range(steps):
        losses, _ = lm.token_losses(batch(number))
        losses.mean().backward()
        adamw.step()
        adamw.zero_grad()
    right = batch(1000, noise=0.1)
    targets = right["targets"]
    twice, not_at_all = torch.full_like(targets, IGNORE), right["input_ids"]
    twice[:, :-1] = targets[:, 1:]
    said = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keeper, log = Keep(), logging.getLogger("llm_recipes.training.proofs")
    log.addHandler(keeper)
    log.setLevel(logging.INFO)
    for name, each in {"right": targets, "shifted twice": twice, "not shifted": not_at_all}.items():
        lines: list[str] = []
        try:
            proofs.labels_aligned(lm, {**right, "targets": each})
            said[name] = " ".join(lines)
        except UserError as error:
            said[name] = f"refused: {error}"
    log.removeHandler(keeper)
    return said


def test_labels_are_judged_by_a_model_that_has_learned_a_cycle(ranks: Any, folders: Any) -> None:
    """Labels shifted twice were found late in a published model's library: the loss falls all the same.

    The cycle 1, 2, 3, 4 is learned with some noise, so that wrong targets too are likelier than chance, as they are
    for a real model and a real text.
    """
    for said in ranks(2, judged, str(folders["mistral"]), 80):
        assert said["right"].startswith("labels: aligned"), said
        assert said["not shifted"].startswith("refused: labels are not aligned"), said
        better = re.search(
            r"^refused: labels are not aligned: targets shifted by -1 .* by (\S+) nats", said["shifted twice"]
        )
        assert better is not None and float(better.group(1)) > 1, said


def test_random_weights_judge_no_labels(ranks: Any, folders: Any) -> None:
    """At chance the right targets are as often the worse ones: that is no error, and no proof."""
    (said,) = ranks(1, judged, str(folders["mistral"]), 0)
    assert all(each.startswith("labels: not judged") for each in said.values()), said
