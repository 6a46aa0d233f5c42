defmodule Mix.Tasks.Image.Models do
  @shortdoc "Lists, fetches, checks and deletes models on the disk"

  @moduledoc """
  Lists, fetches, checks and deletes the models on the disk.

      mix image.models list
      mix image.models pull sd15
      mix image.models pull owner/model --revision v1.0 --yes
      mix image.models verify
      mix image.models verify owner/model --repair
      mix image.models rm owner/model
      mix image.models prune --quota 40GB --dry-run

  Models of the hub are in the cache that all tools of Hugging Face share (`HF_HOME`). Without Elixir the same is
  `starweave-image models`; docs/models.md says more.

  ## Commands

    * `list` - the models on this machine, with size, last use, state and licence; `--json` for programs
    * `pull MODEL` - shows the size and the licence of a model, asks for consent, and fetches it. Files of an earlier
      download are not fetched again. `--revision` names a branch, a tag or a commit (default: what the configuration
      or the catalog says); `--yes` gives consent; `--dry-run` only shows the plan, with exit code 3 if there is
      something to fetch
    * `verify [MODEL]` - compares the files with their checksums; `--repair` fetches again what is missing or damaged
    * `accept MODEL` - accepts weights that you changed, of a configured model with a `:path` or of a folder: their
      present checksums replace those of the first load
    * `rm MODEL` - deletes a model, or one `--revision` of it, unless a process has it loaded
    * `prune --quota SIZE` - deletes the longest unused models until the rest fits, never one in use and never the
      configured default model; `--keep MODEL` keeps another one, `--dry-run` only says what would be deleted

  With `HF_HUB_OFFLINE=1`, or `--offline` for `pull` and `verify`, the hub is not asked.

  ## Exit codes

    * 0 - done
    * 1 - it failed, a file is missing or damaged, or more than the quota remains
    * 2 - wrong usage: an option is wrong, the model is not known, or it is in use
    * 3 - nothing was fetched without consent
    * 69 - there is no Python, or a package of it is missing: run `mix image.setup`
  """

  use Mix.Task

  alias StarweaveImage.Environment
  alias StarweaveImage.Environment.Program
  alias StarweaveImage.Mix.CommandLine

  @commands ~w(list pull verify accept rm prune)
  @usage 2
  @consent 3
  @unavailable 69

  @impl true
  def run(argv), do: CommandLine.run(argv, &manage/1)

  defp manage(argv) do
    # Loads the configuration; a script with Mix.install has no project of its own.
    if Mix.Project.get(), do: Mix.Task.run("app.config")
    config = Application.get_env(:starweave_image, StarweaveImage, [])

    with {:ok, name, options} <- command(argv),
         {:ok, python} <- Environment.python(Keyword.take(config, [:python])) do
      options = named(name, options, config) ++ configured(name, options, config)
      if name == "pull", do: pull(python, options), else: python(python, name, options)
    else
      {:usage, sentence} -> failed(sentence, @usage)
      {:error, sentence} -> failed(sentence, @unavailable)
    end
    |> case do
      0 -> :ok
      code -> exit({:shutdown, code})
    end
  end

  defp failed(sentence, code) do
    CommandLine.complain("[image.models] Error: #{sentence}")
    code
  end

  defp command([]), do: {:ok, "list", []}
  defp command([name | options]) when name in @commands, do: {:ok, name, options}

  defp command([name | _]),
    do: {:usage, "#{name} is none of #{Enum.join(@commands, ", ")}; see `mix help image.models`"}

  # A configured model with a `:path` is named by its id here; Python takes the folder.
  defp named("accept", options, config) do
    paths = for {id, entry} <- models(config), path = entry[:path], into: %{}, do: {id, path}
    Enum.map(options, &Map.get(paths, &1, &1))
  end

  defp named(_name, options, _config), do: options

  # The arguments that the instance's configuration adds to a command.
  defp configured("list", _options, config) do
    for {id, entry} <- models(config), path = entry[:path], do: "--local=#{id}=#{path}"
  end

  defp configured("pull", options, config) do
    for {id, entry} <- models(config),
        id in options and not Enum.any?(options, &String.starts_with?(&1, "--revision")),
        revision = entry[:revision],
        do: "--revision=#{revision}"
  end

  defp configured("prune", _options, config) do
    for id <- List.wrap(config[:default_model]), do: "--keep=#{id}"
  end

  defp configured(_name, _options, _config), do: []

  defp models(config) do
    for entry <- Keyword.get(config, :models, []) do
      if is_binary(entry), do: {entry, []}, else: entry
    end
  end

  # Python has no terminal to ask for consent on, so it runs once to show the plan, and again after the user has agreed.
  defp pull(python, options) do
    if Enum.any?(options, &(&1 in ~w(--yes --dry-run --offline --help -h))) do
      python(python, "pull", options)
    else
      with @consent <- python(python, "pull", ["--dry-run" | options]) do
        if Mix.shell().yes?("Fetch it under this licence?", default: :no) do
          python(python, "pull", ["--yes", "--shown" | options])
        else
          CommandLine.complain("[image.models] Nothing was fetched; with --yes it is not asked")
          @consent
        end
      end
    end
  end

  defp python(python, name, options) do
    # Attached: it ends when this VM ends, which closes its standard input.
    {arguments, env} = Program.command(["models", name, "--attached" | options])

    case Program.run(python, arguments, env: env, into: IO.stream(:stdio, :line)) do
      {:error, reason} -> Mix.raise("Python cannot be started (#{reason}): run `mix image.setup`")
      {_output, code} -> code
    end
  end
end
