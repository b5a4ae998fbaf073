from __future__ import annotations

import json

import pytest

from framequant.config import PRESETS, FrameQuantConfig, preset
from framequant.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name, seed=7, ignore=("lm_head",), overrides={"q_proj": {"bits": 3}})
    assert FrameQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits = 0: expected a value from 1 to 8"),
        ({"bits": 9}, "bits = 9"),
        ({"bits": float("nan")}, "bits"),
        ({"bits": "two"}, "bits = 'two': expected a number"),
        ({"bits": 2.25}, "whole number of bits.*redundancy = 1.125"),
        ({"redundancy": 0.9}, "redundancy = 0.9"),
        ({"redundancy": 1.2, "frame": "hadamard"}, "needs frame = 'fusion'"),
        ({"grid": "loyd_max"}, "Did you mean 'lloyd_max'"),
        ({"damping": -1}, "damping"),
        ({"float_targets": 1.5}, "float_targets"),
        ({"seed": -1}, "seed"),
        ({"levels": 1}, "num_levels"),
        ({"group_size": 0}, "group_size"),
        ({"two_sided": "yes"}, "true or false"),
        ({"ignore": ("(",)}, "not a regular expression"),
        ({"overrides": {"q": {"bist": 3}}}, "unknown setting 'bist'. Did you mean 'bits'"),
        ({"overrides": {"q": {"seed": 3}}}, "cannot be overridden"),
        ({"code": "trellis", "column_order": "descending"}, "column_order"),
        ({"weights_per_state": 2}, "weights_per_state = 2 needs code = 'trellis'"),
        ({"code": "trellis", "weights_per_state": 3}, "from 1 to 2"),
        ({"code": "trellis", "weights_per_state": 2, "bits": 4.5}, "from 1 to 4, with two weights a state"),
        ({"code": "trellis", "weights_per_state": 2, "tile_cols": 9}, "two adjacent weights"),
        ({"output_hadamard_block": 48}, "expected one of 8, 16"),
        ({"output_hadamard_block": True}, "expected an integer or nothing"),
        ({"output_hadamard_block": 32, "two_sided": True}, "two_sided = false"),
        (
            {"output_hadamard_block": 32, "redundancy": 1, "frame": "identity"},
            "frame = 'fusion' or 'hadamard'",
        ),
        (
            {
                "output_hadamard_block": 32,
                "code": "trellis",
                "redundancy": 1,
                "frame": "hadamard",
                "output_feedback": True,
            },
            "output_feedback",
        ),
        ({"redundancy": 1, "frame": "block_hadamard"}, "use frame = 'fusion' and output_hadamard_block"),
    ],
)
def test_bad_settings_are_explained(settings, message):
    with pytest.raises(ConfigError, match=message):
        FrameQuantConfig(**settings)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'framequant-scalar'"):
        preset("framequant-scaler")
    with pytest.raises(ConfigError, match=r"unknown setting 'redundency'\. Did you mean 'redundancy'"):
        preset("gptq", redundency=1.0)
    with pytest.raises(ConfigError, match="unknown setting"):
        FrameQuantConfig.from_dict({"bit": 2})
    with pytest.raises(ConfigError, match="version 99"):
        FrameQuantConfig.from_dict({"version": 99})


def test_overrides_apply_in_order():
    config = FrameQuantConfig(
        overrides={"proj": {"bits": 3}, "q_proj": {"bits": 4}, "layers.0": {"skip": True}}
    )
    assert config.for_linear("layers.1.o_proj").bits == 3
    assert config.for_linear("layers.1.q_proj").bits == 4
    assert config.for_linear("layers.0.q_proj") is None
    assert config.for_linear("layers.1.fc1").bits == 2
