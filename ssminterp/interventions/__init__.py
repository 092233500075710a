"""What to do at a hook: printable values for `model.intervene(...)`.

Each names hooks, selects a part of them (positions, channels, states, batch) and says what happens to it. Where
several meet at one hook they act in the order given.
"""

from ssminterp.interventions.ablate import ablate
from ssminterp.interventions.knockout import knockout
from ssminterp.interventions.patch import freeze, patch
from ssminterp.interventions.steer import scale, steer
from ssminterp.models import Intervention

__all__ = ["Intervention", "ablate", "freeze", "knockout", "patch", "scale", "steer"]
