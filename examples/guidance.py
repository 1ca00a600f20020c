"""Two rows that need each other: classifier-free guidance of a text, with a function that gets the logits of both.

    python examples/guidance.py [MODEL] [--scale 2.0]

Classifier-free guidance (Sanchez et al., 2023, "Stay on topic with Classifier-Free Guidance", arXiv 2306.17806) runs
the same continuation behind two prompts, one of which lacks what the text is to be about. The logits of both give the
next token, which both get: uncond + scale * (cond - uncond). Scale 1 is the model itself; more of it stays closer to
the prompt.

Both requests have one `batch_logits_processor`. It is called once a step, with the prompts, the generated ids and the
logits of all rows that have it. The two rows run in the same steps, as they begin together and have the same length
from there on; if they ever come apart, for example because memory for one is short, the function says so.
"""

import argparse

from torch import Tensor

from nanoengine import LLM, SamplingParams

TOPIC, BEGIN = "A short story about a dragon and the sea.\n\n", "Once upon a time there"


class Guidance:
    """Guides pairs of requests. Each pair is added by its two prompts, as ids."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.pairs: list[tuple[list[int], list[int]]] = []  # with what it is about, and without

    def __call__(
        self, prompts: list[list[int]], outputs: list[list[int]], logits: Tensor
    ) -> Tensor:  # [R, V] -> [R, V]
        logprobs = logits.log_softmax(-1)
        for with_topic, without in self.pairs:
            if with_topic not in prompts and without not in prompts:
                continue  # both have ended
            if with_topic not in prompts or without not in prompts:
                raise RuntimeError("one of two rows that need each other runs without the other")
            cond, uncond = prompts.index(with_topic), prompts.index(without)
            assert outputs[cond] == outputs[uncond]
            guided = logprobs[uncond] + self.scale * (logprobs[cond] - logprobs[uncond])
            logits[cond] = logits[uncond] = guided
        return logits


def guided_text(llm: LLM, scale: float, tokens: int = 40) -> str:
    guidance = Guidance(scale)
    tokenizer = llm.get_tokenizer()
    prompts = [tokenizer.encode(TOPIC + BEGIN), tokenizer.encode(BEGIN)]
    guidance.pairs.append((prompts[0], prompts[1]))
    params = SamplingParams(temperature=0, max_tokens=tokens, batch_logits_processor=guidance)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error is not None:
            raise output.error
    with_topic, without = (output.outputs[0] for output in outputs)
    assert with_topic.token_ids == without.token_ids
    return with_topic.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--scale", type=float, default=2.0, help="of the guidance; 1 is the model itself")
    given = parser.parse_args()
    with LLM(given.model, max_model_len=512) as llm:
        for scale in (0.0, 1.0, given.scale):
            print(f"scale {scale}: {BEGIN}{guided_text(llm, scale)}\n")


if __name__ == "__main__":
    main()
