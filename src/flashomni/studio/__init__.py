"""``flashomni studio``: a page to try recipes on, beside the stock pipeline. Extra ``studio``.

``shelf`` has the pipelines, ``session`` an open page, ``turns`` the queue at a pipeline, ``knobs``
the settings of a recipe as controls, ``watch`` and ``preview`` what is seen of a run, ``drawings``
and ``pictures`` what is seen of its result. Only ``panels`` and ``app`` know Gradio.
"""
