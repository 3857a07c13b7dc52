"""What a config means: read as transformers reads it, everything else refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers

from memos_engine.decoder.spec import SUPPORTED_ARCHITECTURES, LayerSpec, ModelSpec, RopeSpec
from memos_engine.errors import ModelFilesError, UnsupportedModelError

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# As older and newer folders say it: fields left out take the defaults of the architecture.
FOLDERS = {
    "llama 2": ("LlamaForCausalLM", {}),
    "llama 3.1": (
        "LlamaForCausalLM",
        {
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 64},
        },
    ),
    "llama, its window where no scaling names one": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
    ),
    "llama, older name of the type": (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral 0.1": ("MistralForCausalLM", {"sliding_window": 4096, "rope_theta": 1e4}),
    "mistral, window by default": ("MistralForCausalLM", {}),
    "mistral 0.3": ("MistralForCausalLM", {"sliding_window": None, "rope_theta": 1e6}),
    "qwen2.5": (
        "Qwen2ForCausalLM",
        {
            "rope_theta": 1e6,
            "sliding_window": 32,
            "max_window_layers": 2,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5 with yarn": (
        "Qwen2ForCausalLM",
        {
            "rope_theta": 1e6,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "qwen2 sliding": (
        "Qwen2ForCausalLM",
        {"sliding_window": 32, "max_window_layers": 2, "use_sliding_window": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"rope_theta": 1e6, "rope_scaling": None, "max_window_layers": 6}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"rope_theta": 5e6, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0, 1, 1]},
    ),
    "smollm3, all by default": ("SmolLM3ForCausalLM", {}),
    "smollm3, another interval": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "gemma 3": (
        "Gemma3ForCausalLM",
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 16,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 64,
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
    "gemma 3, all by default": ("Gemma3ForCausalLM", {}),
    "gemma 3, scaled": ("Gemma3ForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "phi 3": ("Phi3ForCausalLM", {"sliding_window": 47, "rope_scaling": None, "tie_word_embeddings": False}),
    "phi 4 mini": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_means_what_transformers_reads_from_it(tmp_path, name):
    """The raw file, the config that transformers makes of it, and that config saved again."""
    architecture, fields = FOLDERS[name]
    raw = json.dumps(SIZES | fields | {"architectures": [architecture]})
    kind = getattr(transformers, architecture).config_class
    theirs = kind(**json.loads(raw))
    ours = ModelSpec.from_dict(json.loads(raw))
    assert ours == ModelSpec.from_config(theirs, architecture)
    kind(**json.loads(raw)).save_pretrained(tmp_path)
    assert ours == ModelSpec.from_folder(tmp_path)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert len(ours.layers) == ours.num_layers == 6


def test_windows_and_rotations_go_by_layer():
    def layers(name):
        architecture, fields = FOLDERS[name]
        return ModelSpec.from_dict(SIZES | fields | {"architectures": [architecture]}).layers

    assert layers("qwen2 sliding") == (LayerSpec(0),) * 2 + (LayerSpec(32),) * 4
    assert layers("qwen2.5") == (LayerSpec(0),) * 6
    assert layers("mistral, window by default") == (LayerSpec(4096),) * 6
    assert [layer.rope for layer in layers("smollm3")] == [0, 0, 0, None, 0, 0]
    assert layers("gemma 3") == (LayerSpec(16, 0), LayerSpec(16, 0), LayerSpec(0, 1)) * 2


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3 | {"rope_type": "llama3", "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.7,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
}


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("name", ROPES)
def test_tables_equal_transformers_bit_for_bit(name, head_dim, theta):
    fields = SIZES | {"head_dim": head_dim, "rope_parameters": {**ROPES[name], "rope_theta": theta}}
    config = transformers.LlamaConfig(**fields)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    rope = ModelSpec.from_config(config, "LlamaForCausalLM").rope
    assert torch.equal(rope.inv_freq(head_dim), rotary.inv_freq)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    cos, sin = rotary(torch.ones(1), torch.arange(256)[None])
    half = head_dim // 2
    assert torch.equal(rope.table(head_dim, 256), torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1))


def test_partial_rotation_turns_the_first_channels():
    rope = RopeSpec(theta=1e4, partial=0.75)
    assert rope.table(32, 10).shape == (10, 24)
    assert torch.equal(rope.inv_freq(32), RopeSpec(theta=1e4).inv_freq(24))


# -- identity ------------------------------------------------------------------------------------


def test_geometry_is_canonical_and_covers_every_field():
    spec = ModelSpec.from_dict(SIZES | {"architectures": ["Gemma3ForCausalLM"]})
    text = spec.geometry()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert json.loads(text).keys() == spec.__dataclass_fields__.keys()
    assert replace(spec).geometry() == text
    local, full = spec.ropes
    changed = {
        "rope": replace(spec, ropes=(local, replace(full, theta=5.0))),
        "factor": replace(spec, ropes=(replace(local, attention_factor=1.1), full)),
        "window": replace(spec, layers=(LayerSpec(7), *spec.layers[1:])),
        "no rotation": replace(spec, layers=(LayerSpec(spec.layers[0].window, None), *spec.layers[1:])),
        "order": replace(spec, layers=spec.layers[::-1]),
        "bias": replace(spec, biases=("q",)),
        "scale": replace(spec, sm_scale=0.5),
    }
    texts = {name: other.geometry() for name, other in changed.items()}
    assert len({text, *texts.values()}) == len(texts) + 1


# -- refusals ------------------------------------------------------------------------------------

OTHERS = [
    "ApertusForCausalLM",
    "BloomForCausalLM",
    "CohereForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GemmaForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForSequenceClassification",
    "MinistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "PhiForCausalLM",
    "PhimoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
]


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_name_themselves_and_the_supported_ones(name):
    with pytest.raises(UnsupportedModelError) as error:
        ModelSpec.from_dict(SIZES | {"architectures": [name]})
    assert str(error.value).startswith(f"{name} is not supported.")
    for supported in SUPPORTED_ARCHITECTURES:
        assert supported in str(error.value)


def test_a_config_without_architectures_is_named_by_its_type():
    with pytest.raises(UnsupportedModelError, match=r"model_type 'bert' is not supported.*Qwen3ForCausalLM"):
        ModelSpec.from_dict(SIZES | {"model_type": "bert"})


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, r"hidden_act='gelu'.*Supported: silu"),
        ("Gemma3ForCausalLM", {"hidden_activation": "relu"}, "hidden_activation='relu'"),
        ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"'dynamic'.*yarn"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope"}}, r"'longrope'.*llama3"),
        ("Phi3ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "Phi3ForCausalLM.*'yarn'"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5"),
        ("Gemma3ForCausalLM", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("Qwen3ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "by layer type"),
        ("MistralForCausalLM", {"quantization_config": {"quant_method": "awq"}}, "awq.*unquantised"),
        ("Gemma3ForCausalLM", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("Qwen2ForCausalLM", {"layer_types": ["chunked_attention"] * 6}, r"'chunked_attention'.*sliding"),
        ("Qwen2ForCausalLM", {"layer_types": ["full_attention"] * 5}, "5 entries for 6 layers"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention"] * 6}, "no sliding_window"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "2 entries for 6 layers"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "evenly"),
    ],
)
def test_features_are_refused_by_name(architecture, fields, words):
    with pytest.raises(UnsupportedModelError, match=words):
        ModelSpec.from_dict(SIZES | fields | {"architectures": [architecture]})


@pytest.mark.parametrize("name", SUPPORTED_ARCHITECTURES)
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_number_is_an_error_of_the_files(tmp_path, name, field):
    config = {key: value for key, value in SIZES.items() if key != field} | {"architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFilesError, match=field):
        ModelSpec.from_folder(tmp_path)


def test_gemmas_scales():
    spec = ModelSpec.from_dict(SIZES | {"architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 64})
    assert spec.sm_scale == 1 / 8
    assert spec.embed_scale == math.sqrt(64)
    assert spec.tie_embeddings
