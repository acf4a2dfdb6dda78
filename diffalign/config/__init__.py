"""The config: a typed schema, YAML plus `key=value`, all mistakes reported together before torch is imported."""

from diffalign.config.checks import check_model as check_model
from diffalign.config.checks import validate as validate
from diffalign.config.dotted import at as at
from diffalign.config.dotted import flat as flat
from diffalign.config.dotted import put as put
from diffalign.config.dotted import within as within
from diffalign.config.files import find as find
from diffalign.config.files import folders as folders
from diffalign.config.files import load as load
from diffalign.config.files import presets as presets
from diffalign.config.files import rule_of as rule_of
from diffalign.config.legend import explained as explained
from diffalign.config.marks import mark as mark
from diffalign.config.messages import completed as completed
from diffalign.config.messages import differences as differences
from diffalign.config.messages import dump as dump
from diffalign.config.messages import given as given
from diffalign.config.messages import settings as settings
from diffalign.config.messages import settings_for as settings_for
from diffalign.config.schema import Config as Config
