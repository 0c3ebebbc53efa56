"""Visual question answering: question-guided attention over picture regions, fusion of both, a classifier of answers.

The model is the classic one of Anderson et al. ("Bottom-up and top-down attention", 2018) with encoders that are not
trained: what is compared are the modules between the encoders and the answer.
"""
