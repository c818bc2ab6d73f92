def add_quickstart_arguments(parser):
    pass


def quickstart_command(parser, rest):
    return 0
