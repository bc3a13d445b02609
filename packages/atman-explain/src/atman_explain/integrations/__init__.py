"""AtMan inside other libraries, each an optional extra; a module here imports the library it is named after."""
