print("passed", flush=True)


def f(x):
    print("passed")
