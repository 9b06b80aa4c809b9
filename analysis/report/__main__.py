from analysis.report import __doc__ as USAGE, main
from disinhib import errors

errors.run(main, USAGE)
