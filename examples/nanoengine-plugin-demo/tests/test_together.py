"""All parts in one engine; they are found by the entry point."""

from nanoengine_plugin_demo.checkpoint import write
from transformers import OPTForCausalLM

from nanoengine import LLM, SamplingParams

PROMPTS = [list(b"The sea"), list(b"A boat"), list(b"The sea and a boat")]


def test_the_engine_gives_the_tokens_of_transformers(tmp_path):
    folder = write(tmp_path / "opt")
    reference = OPTForCausalLM.from_pretrained(folder)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(folder, attention="row_by_row", num_gpu_blocks_override=64, device="cpu") as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(reference(reference.dummy_inputs["input_ids"].new_tensor([ids])).logits[0, -1].argmax()))
        assert list(output.outputs[0].token_ids) == ids[len(prompt) :]


def test_the_processor_narrows_what_is_drawn(tmp_path):
    wide = SamplingParams(temperature=3.0, seed=1, max_tokens=48, ignore_eos=True)
    with LLM(write(tmp_path / "opt"), num_gpu_blocks_override=64, device="cpu") as llm:
        outputs = llm.generate([PROMPTS[0]] * 2, [wide, wide.replace(top_n_sigma=1e-4)], use_tqdm=False)
        greedy = llm.generate([PROMPTS[0]], wide.replace(temperature=0), use_tqdm=False)
    free, narrow = (output.outputs[0].token_ids for output in outputs)
    assert narrow == greedy[0].outputs[0].token_ids  # only the likeliest token is so near the highest
    assert free != narrow
