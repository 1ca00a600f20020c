"""Text at the engine's edge: tokenizer, chat templates, incremental detokenization, stop strings. Torch-free.

Interface of the rest of the core:

    tokenizer = load_tokenizer(folder)                 # None: the model serves token ids only
    ids = tokenizer.encode(text)                       # or tokenizer.apply_chat_template(messages, ...), whose
                                                       # template runs in a process of its own
    detokenizer = IncrementalDetokenizer.from_params(tokenizer, params)     # one a sample
    stop = detokenizer.push(new_ids)                   # a stop string: the sample is over, its text final
    stop = detokenizer.finish()                        # ended by length or abort
    detokenizer.finish(stop_token=id)                  # ended by EOS or a stop token that was not pushed
    detokenizer.text                                   # cumulative, safe to show
"""

from nanoengine.text.detokenizer import IncrementalDetokenizer
from nanoengine.text.templates import TemplateProcesses
from nanoengine.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["IncrementalDetokenizer", "TemplateProcesses", "Tokenizer", "load_tokenizer"]
