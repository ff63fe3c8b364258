"""How good a model is, and whether that is enough.

measures   numbers from outputs and targets          scoring   outputs of a model, or of a bundle as it will be served
floors     the plainest thing that could work        baselines the same for ratings
gate       what stands between a bundle and shelf    bootstrap intervals
exams      what other models have been asked too  language  what a language model makes of answers
"""
