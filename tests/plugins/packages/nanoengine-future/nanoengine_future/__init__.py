"""Written for a plugin interface that does not exist yet."""

from nanoengine.api import AttentionSpec, hookimpl


@hookimpl
def register_attention_backends():
    return [AttentionSpec(name="future", target="nanoengine_future.backend:Future", api=99)]
