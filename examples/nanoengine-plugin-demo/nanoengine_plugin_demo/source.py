"""`model=opt-tiny`: a tiny OPT with random weights. It is written to the cache when it is first requested."""

from nanoengine.api import ModelSource

NAME = "opt-tiny"


class TinyOPT(ModelSource):
    def resolve(self, source, ctx):
        if source != NAME:
            return None
        folder = ctx.cache / "plugin-demo" / NAME
        if not (folder / "config.json").is_file():
            from nanoengine_plugin_demo.checkpoint import write  # imports torch and transformers

            ctx.say(f"writing {NAME} to {folder}")
            write(folder)
        return folder
