"""An offline script as for vLLM; only the import is different.

python examples/offline_inference.py [MODEL]
"""

import argparse

from nanoengine import LLM, SamplingParams

PROMPTS = [
    "The capital of Italy is",
    "Water freezes at a temperature of",
    "The opposite of up is",
    "She opened the door and saw",
]


def main(model: str) -> None:
    llm = LLM(model=model, max_model_len=512, max_num_seqs=16, seed=0)

    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=1, logprobs=1)
    for output in llm.generate(PROMPTS, sampling_params):
        completion = output.outputs[0]
        print(f"{output.prompt!r} -> {completion.text!r}")
        print(
            f"    {len(completion.token_ids)} tokens, {completion.finish_reason}, {completion.cumulative_logprob:.1f}"
        )

    conversation = [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Tell me the capital of France."},
    ]
    [answer] = llm.chat(conversation, SamplingParams(temperature=0.0, max_tokens=32))
    print(answer.outputs[0].text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    main(parser.parse_args().model)
