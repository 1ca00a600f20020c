"""Hidden states of prompts: which sentences have similar meanings, and what the model predicts after each layer.

    python examples/hidden_states.py [MODEL]

`LLM.hidden_states` returns the model's output for each token; `LLM.tap` returns the inputs and outputs of any module.
Both are captured in the engine, with its kernels and KV cache; there is no second implementation of the model.
"""

import argparse

import torch
from torch import Tensor

from nanoengine import LLM

SENTENCES = [
    "The cat sleeps on the warm sofa.",
    "A kitten is napping on the couch.",
    "Interest rates rose by half a percent.",
    "The central bank made borrowing more expensive.",
]
PROMPT = "The capital of France is"


def similarities(llm: LLM) -> Tensor:
    """Cosine between the mean hidden states of sentences, without their common part: [sentences, sentences]."""
    means = torch.stack([states.float().mean(0) for states in llm.hidden_states(SENTENCES)])
    means = means - means.mean(0)
    means = means / means.norm(dim=-1, keepdim=True)
    return means @ means.T


def answers_by_layer(llm: LLM, prompt: str) -> list[str]:
    """The likeliest next token if the last norm and the output layer are applied after each layer ("logit lens")."""
    names = [name for name, _ in llm.model.named_modules() if name.removeprefix("model.layers.").isdigit()]
    [taps] = llm.tap(prompt, names)
    device = next(llm.model.parameters()).device
    tokenizer = llm.get_tokenizer()
    words = []
    for name in names:
        stream = sum(taps[name].outputs)  # the layer's result plus the residual stream, [T, hidden]
        with torch.inference_mode():
            hidden = llm.model.get_submodule("model.norm")(stream[-1:].to(device))
            words.append(tokenizer.decode([int(llm.model.compute_logits(hidden).argmax())]))
    return words


def main(model: str) -> None:
    with LLM(model, max_model_len=256) as llm:
        [states] = llm.hidden_states(PROMPT)
        print(f"{PROMPT!r}: {states.shape[0]} tokens, each a vector of {states.shape[1]} ({states.dtype})\n")

        for sentence, row in zip(SENTENCES, similarities(llm), strict=True):
            print("".join(f"{value:6.2f}" for value in row.tolist()), "", sentence)

        print(f"\n{PROMPT!r}, predicted after each layer:")
        for layer, word in enumerate(answers_by_layer(llm, PROMPT)):
            print(f"{layer:>4}  {word!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    main(parser.parse_args().model)
