import pytest
from nanoengine_plugin_demo.checkpoint import write
from nanoengine_plugin_demo.opt import OPT
from transformers import OPTForCausalLM

from nanoengine.api import ModelError
from nanoengine.testing.conformance import check_model


@pytest.mark.parametrize("tied", [True, False])
def test_it_agrees_with_transformers_on_one_rank_and_two(tied, tmp_path):
    folder = write(tmp_path / "opt", tie_word_embeddings=tied)
    check_model(OPT, folder, OPTForCausalLM.from_pretrained(folder))


def test_what_it_does_not_support_is_rejected_by_name():
    hf = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 8}
    hf["max_position_embeddings"] = 32
    assert OPT.read_config(hf).max_model_len == 32
    with pytest.raises(ModelError, match="do_layer_norm_before"):
        OPT.read_config({**hf, "do_layer_norm_before": False})
    with pytest.raises(ModelError, match="multiple of num_attention_heads"):
        OPT.read_config({**hf, "hidden_size": 9})
