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
        files: ~w(lib priv docs mix.exs README.md CHANGELOG.md LICENSE NOTICE)
      ],
      docs: docs(),
      elixirc_paths: elixirc_paths(Mix.env()),
      test_paths: ["tests/elixir"],
      start_permanent: Mix.env() == :prod,
      deps: []
    ]
  end

  # What `mix docs` reads where ex_doc is installed. It is no dependency, as no package is.
  defp docs do
    how_to = ~w(docs/cheatsheet.cheatmd docs/models.md docs/journal.md docs/starweave.md)

    how_it_works = ~w(docs/architecture.md docs/protocol.md docs/reliability.md docs/benchmarks.md
         docs/fuzzing.md)

    [
      main: "StarweaveImage",
      extras: ["README.md"] ++ how_to ++ how_it_works ++ ~w(CHANGELOG.md LICENSE NOTICE),
      groups_for_extras: ["How to": how_to, "How it works": how_it_works],
      # All pages lie in one folder, so that pictures are where the text of each page looks for them.
      assets: %{"docs/readme" => "docs/readme", "docs/images" => "images"},
      groups_for_modules: [
        Values: [
          StarweaveImage.Request,
          StarweaveImage.Image,
          StarweaveImage.Text,
          StarweaveImage.Result,
          StarweaveImage.Error
        ],
        "Around an instance": [
          StarweaveImage.Config,
          StarweaveImage.Environment,
          StarweaveImage.Telemetry
        ],
        Hosts: [StarweaveImage.Client]
      ],
      groups_for_docs:
        for(
          name <- ["Start", "Pictures", "Jobs", "Models", "Health", "Sidecars"],
          do: {String.to_atom(name), &(&1[:group] == name)}
        ),
      # These tell of modules that have no pages.
      skip_undefined_reference_warnings_on: [
        "docs/architecture.md",
        "StarweaveImage.Config.groups/0"
      ]
    ]
  end

  # No `mod`: an instance is a child of the host's own supervision tree.
  def application do
    [extra_applications: [:logger, :crypto]]
  end

  defp elixirc_paths(:test), do: ["lib", "tests/support"]
  defp elixirc_paths(_env), do: ["lib"]
end
