"""sr-serve: the web application and its API.

cli.py starts it; app.py holds the routes, guard.py what every request passes through. A picture is an Order (orders.py)
that models.py carries out on the Upscaler of its model: at once (requests.py), or as a job that is kept in SQLite
(store.py) until a thread has done it (jobs.py).
"""
