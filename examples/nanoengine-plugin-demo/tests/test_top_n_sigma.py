import nanoengine_plugin_demo
import torch
from nanoengine_plugin_demo.top_n_sigma import TopNSigma

from nanoengine.api import ProcessorContext, ProcessorRows
from nanoengine.testing.conformance import check_processor


def test_it_passes_the_conformance_kit():
    [spec] = nanoengine_plugin_demo.register_samplers()
    check_processor(spec, {"top_n_sigma": 1.0}, {"top_n_sigma": 0.3}, refused=[{"top_n_sigma": -1.0}])


def test_it_keeps_what_is_near_the_highest_logit():
    processor = TopNSigma(ProcessorContext(max_slots=1, vocab_size=5, max_model_len=8, device=torch.device("cpu")))
    rows = ProcessorRows(
        slots=torch.tensor([0]),
        positions=torch.tensor([3]),
        prompt_lens=torch.tensor([3]),
        vocab_start=0,
        vocab_size=5,
        columns={"top_n_sigma": torch.tensor([1.0])},
    )
    gone = float("-inf")
    # Without the removed token: mean 1, standard deviation sqrt(((-1)² + 1² + 1² + (-1)²) / 4) = 1.
    out = processor.apply(torch.tensor([[0.0, 2.0, 2.0, 0.0, gone]]), rows)
    assert out.tolist() == [[gone, 2.0, 2.0, gone, gone]]
