"""A whole run, from the log to the report, with the methods and base models that the quick start does not take."""

import importlib.util
import json
from pathlib import Path

import pytest

from recllm.cli import main

without_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra quant)"
)


@pytest.mark.parametrize(
    ("override", "files", "said"),
    [
        pytest.param("adapter.method=soft_token", {"soft_token.safetensors", "soft_token.json"}, "no, because a soft",
                     id="soft_token"),
        pytest.param("model.quantization=4bit", {"gate.safetensors", "ilora.json"}, "yes, with --max-lora-rank 8",
                     id="4bit", marks=without_bitsandbytes),
    ],
)  # fmt: skip
def test_run(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, files: set[str], said: str
) -> None:
    assert main(["run", str(tiny_recipe), override]) == 0
    assert f"servable by vLLM 0.32: {said}" in capsys.readouterr().err
    adapter = tmp_path / "run" / "adapter"
    assert files <= {path.name for path in adapter.iterdir()}
    assert (adapter / "sequence_encoder" / "encoder.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
