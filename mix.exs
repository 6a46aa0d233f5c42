defmodule StarweaveImage.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :starweave_image,
      version: @version,
      elixir: "~> 1.14",
      description: "Image generation as a supervised part of an Elixir application",
      package: [
        licenses: ["Apache-2.0"],
        files: ~w(lib priv mix.exs README.md CHANGELOG.md LICENSE NOTICE)
      ],
      elixirc_paths: elixirc_paths(Mix.env()),
      test_paths: ["tests/elixir"],
      start_permanent: Mix.env() == :prod,
      deps: []
    ]
  end

  # No `mod`: an instance is a child of the host's own supervision tree.
  def application do
    [extra_applications: [:logger, :crypto]]
  end

  defp elixirc_paths(:test), do: ["lib", "tests/support"]
  defp elixirc_paths(_env), do: ["lib"]
end
