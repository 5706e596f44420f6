"""online-dpo's built-in judges, one module each; an experiment names them as "judges.length:LengthJudge".

`ONLINE_DPO` tells this package from another project's of the same name.
"""

ONLINE_DPO = True
