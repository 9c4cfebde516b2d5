def pytest_collection_modifyitems(items):
    """The tests of data preparation fork: they come before those that start threads, whose locks a fork would keep."""
    items.sort(key=lambda item: item.path.name != "test_prepare.py")
