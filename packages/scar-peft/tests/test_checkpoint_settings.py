"""What an original checkpoint says about itself: both kinds of settings file, and all that can be wrong there."""

import pytest

from scar_peft.checkpoint_settings import PII_CONCEPTS, read_settings

PUBLISHED = {
    "model_type": "llama3_SAE",
    "base_model_name": "meta-llama/Meta-Llama-3-8B",
    "hook_block_num": 25,
    "site": "mlp",
    "n_inputs": 4096,
    "n_latents": 24576,
    "activation": "topk",
    "activation_k": 2048,
    "normalize": False,
    "tied": False,
    "mod_features": None,
}
TRAINER = {
    "batch_size": 2048,
    "ds_path": "./datasets_v2/llama3-PII_300k_mult_lang-B11-block",
    "factor": 6,
    "k": 2048,
    "n_inputs": 4096,
    "activation": "topk-sigmoid",
}


def test_the_published_configuration_is_read():
    found = read_settings(PUBLISHED)
    assert (found.layer, found.site, found.hidden_size) == (25, "mlp", 4096)
    assert (found.n_latents, found.k, found.activation) == (24576, 2048, "topk")
    assert found.concepts == ("toxicity",)
    assert found.base_model == "meta-llama/Meta-Llama-3-8B"
    assert found.label_source.startswith("RealToxicityPrompts")


def test_a_published_configuration_without_a_site_means_the_default_of_its_class():
    assert read_settings({**PUBLISHED, "site": None}).site == "mlp"


def test_the_trainers_file_tells_layer_site_and_concepts_by_the_name_of_its_data():
    found = read_settings(TRAINER)
    assert (found.layer, found.site, found.n_latents) == (11, "block", 24576)
    assert found.activation == "topk-sigmoid"
    assert found.concepts == PII_CONCEPTS
    assert len(set(PII_CONCEPTS)) == 25


@pytest.mark.parametrize(
    ("data", "concepts"),
    [("llama3-RTP_split-B11-block", ("toxicity",)), ("gemma2-SP-B14-block/", ("shakespeare",))],
)
def test_data_sets_of_one_concept_are_known(data, concepts):
    assert read_settings({**TRAINER, "ds_path": f"a/b-c/{data}"}).concepts == concepts


def test_without_a_data_set_the_name_of_the_file_tells_the_layer():
    found = read_settings({**TRAINER, "ds_path": ""}, "llama3-l24576-b25-k2048.json", site="mlp")
    assert (found.layer, found.site) == (25, "mlp")


def test_arguments_overrule_the_file():
    found = read_settings(PUBLISHED, layer=3, site="block", concepts=["formal", "rude"])
    assert (found.layer, found.site, found.concepts) == (3, "block", ("formal", "rude"))
    assert found.label_source is None


def test_an_activation_without_selection_needs_no_k():
    assert read_settings({**PUBLISHED, "activation": "relu", "activation_k": None}).k is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_inputs": None}, r"config.json: n_inputs must be a whole number in \[1, 1048576\], got None"),
        ({"n_inputs": True}, "n_inputs must be a whole number .*, got True"),
        ({"n_latents": 1 << 40}, r"n_latents must be a whole number in \[1, 16777216\], got 1099511627776"),
        ({"activation_k": 30000}, r"activation_k must .* in \[1, 24576\] \(the number of latents\), got 30000"),
        ({"activation_k": None}, "config.json: activation_k must be .*, got None"),
        ({"activation": "jumprelu"}, r"activation must be one of \['topk', .*'relu'\], got 'jumprelu'"),
        ({"hook_block_num": -1}, r"hook_block_num must be a whole number in \[0, 4095\], got -1"),
        ({"site": "attention"}, r"config.json: site must be one of \['mlp', 'block'\], got 'attention'"),
        ({"base_model_name": 3}, "base_model_name must be the name of a model, got 3"),
    ],
)
def test_a_bad_value_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings({**PUBLISHED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ds_path": ""}, r"hook_block_num is missing; pass layers=\[...\] with the block that was coded"),
        ({"ds_path": "llama3-weather-B11-block"}, "concepts of the data set 'weather' are not known; pass concepts="),
        ({"ds_path": "llama3-RTP-B11"}, 'site is missing; pass site="mlp" or site="block"'),
        ({"factor": 1 << 20}, r"factor must be a whole number in \[1, 4096\], got 1048576"),
    ],
)
def test_what_the_trainers_file_leaves_open_has_to_be_said(changes, message):
    with pytest.raises(ValueError, match=message):
        read_settings({**TRAINER, **changes})


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ("toxicity", r"concepts must be a list of names, got the text 'toxicity'; write \['toxicity'\]"),
        ([], r"concepts must hold 1 to 24576 names \(the number of latents\), got 0"),
    ],
)
def test_concepts_must_be_a_list_of_names(concepts, message):
    with pytest.raises(ValueError, match=message):
        read_settings(PUBLISHED, concepts=concepts)


def test_a_file_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match=r"settings\.json: must hold a JSON object, got list"):
        read_settings([], "settings.json")
