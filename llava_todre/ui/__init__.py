"""The page of ``todre demo --ui``: one question, two methods, side by side.

``uploads`` reads what visitors send, ``studio`` holds the model and answers piece by piece,
``watch`` reports progress and stops, ``drawing`` and ``chart`` make the pictures, ``facts`` the
words beside them, and ``visit`` is one question to both methods. Only ``page``, where everything
has its place, and ``serve``, which opens it, know gradio.
"""
