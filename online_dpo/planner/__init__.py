"""What a run will take: seconds, memory, disk and tokens, stage by stage.

How much work a round is follows from the experiment (`work`). Seconds come from one of two places: straight lines
through what stages really took on this machine (`measured`), in a finished run (`observed`) or a short real one
(`rehearsal`); or a data sheet's figures and assumed utilisations (`paper`). Memory and disk are formulas (`memory`,
`disk`).
"""
