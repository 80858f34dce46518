"""Local exports of loaded models: made at the first load, matched or made anew afterwards.

- `hashing`: contents of files, hashed by threads and not twice
- `identity`: what a model is made from, as readable values
- `store`: the folder of an export: its metadata, its verification, its atomic exchange
- `proving`: whether a loader makes of an export the model that was exported
- `matching`: the decision, load the export or make it anew
- `commands`: `opguard exports list|verify|prune`
"""
