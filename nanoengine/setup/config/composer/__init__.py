"""Composition of YAML in Hydra's style. It knows no schema: `nanoengine.setup.config.config` does.

As in Hydra 1.3: a defaults list (groups, files, `_self_`) in the file that is run, overrides (`key=`, `+key=`,
`++key=`, `~key`, `group=option`), and interpolation (`${key}`, `${.key}`, `${oc.env:NAME,DEFAULT}`). Everything else of
Hydra, omegaconf and YAML is refused by name, with what to write instead: `docs/cli.md` lists it.

Two things differ on purpose: override values are YAML (`{a: 1}` needs its blank), and `group=option` adds the group
where the defaults list lacks it.
"""

from nanoengine.setup.config.composer.compose import Composed, compose
from nanoengine.setup.config.composer.defaults import Shorthand
from nanoengine.setup.config.composer.search_path import Root, SearchPath, package_root

__all__ = ["Composed", "Root", "SearchPath", "Shorthand", "compose", "package_root"]
