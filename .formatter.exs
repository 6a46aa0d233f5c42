[inputs: ["{mix,.formatter}.exs", "{bench,lib,tests}/**/*.{ex,exs}"]]
