from hbp_tune import components as components
from hbp_tune import config as config
from hbp_tune import data as data
from hbp_tune import models as models
from hbp_tune import parallel as parallel
from hbp_tune import planning as planning
from hbp_tune import reporting as reporting
from hbp_tune import training as training
from hbp_tune.errors import ConfigError as ConfigError
from hbp_tune.errors import DataError as DataError
from hbp_tune.notebook import Plan as Plan
from hbp_tune.notebook import plan as plan

__version__: str
