"""Composition of YAML in Hydra's style on omegaconf. It knows no schema: `nanoengine.setup.config.config` does.

What works as in Hydra 1.3: defaults lists (groups, lists of options, plain files, `_self_`, nested ones), overrides
(`key=`, `+key=`, `++key=`, `~key`, `group=option`) and omegaconf's interpolation. What does not, refused by name:
packages (`group@package`, `# @package`), `override`, `optional`, `/group` and interpolation in a defaults list, sweeps,
override functions, `hydra:` settings and `_target_`.

Two things differ on purpose: override values are YAML, as everywhere in omegaconf (`{a: 1}` wants its blank); and
`group=option` adds the group at the end of a defaults list that lacks it.
"""

from nanoengine.setup.config.composer.compose import Composed, compose
from nanoengine.setup.config.composer.search_path import Root, SearchPath, package_root
from nanoengine.setup.config.composer.shorthand import Shorthand

__all__ = ["Composed", "Root", "SearchPath", "Shorthand", "compose", "package_root"]
