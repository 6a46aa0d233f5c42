defmodule Mix.Tasks.Image.Gen do
  @shortdoc "Generates an image from a text"

  alias StarweaveImage.{Client, Config, Error, Image, Output, Request, Schema}
  alias StarweaveImage.Mix.{CommandLine, Progress}

  # The option groups that describe the picture become switches. The changes below apply only to the command; the other
  # groups of options are for services.
  [{drawing, to_draw}, {starting, to_start}, {file, of_file} | _] = Schema.groups()
  [{_, processes}] = Enum.filter(Config.groups(), fn {title, _} -> title == "Processes" end)

  @groups [
    {drawing,
     [prompt: {:string, "TEXT", "what to draw; required"}] ++
       Keyword.replace!(
         CommandLine.switches(to_draw),
         :model,
         {:string, "MODEL", "a model's id, or a local folder in diffusers layout"}
       )},
    {starting,
     CommandLine.switches(to_start) ++
       [variations: {:integer, "N", "N variations of `--image`, or else of the prompt"}]},
    {file,
     [
       out:
         {:string, "FILE", "where to write it (default: image.png); several images are numbered"}
     ] ++
       Keyword.merge(CommandLine.switches(of_file),
         format: {:string, "FORMAT", "`png`, `jpeg` or `webp` (default: what `--out` ends in)"},
         preview:
           {:boolean, nil,
            "show how the image forms in a file beside `--out`, such as `image.preview.jpg`, removed at the end"}
       )},
    {"How it runs",
     CommandLine.switches(Keyword.take(processes, [:device, :dtype])) ++
       [
         timeout:
           {:integer, "SECONDS", "give up after so long, loading included (default: 3600)"},
         list_models: {:boolean, nil, "list the models instead, and generate nothing"},
         help: {:boolean, nil, "show this"},
         quiet: {:boolean, nil, "say nothing but errors"},
         verbose: {:boolean, nil, "show the log of the Python process"},
         host: {:string, "HOST", "accepted for compatibility and ignored: there is no server"},
         port: {:integer, "PORT", "as `--host`"}
       ]}
  ]

  @moduledoc """
  Generates an image from a text.

      mix image.gen --prompt "a red apple" --out apple.png
      mix image.gen --prompt "a cat" --out cats.webp --num-images 4 --seed 1
      mix image.gen --prompt "a red apple" --model ./my-model --width 512 --height 512
      mix image.gen --prompt "a red apple" --out apple.png --preview
      mix image.gen --prompt "a green pear" --image apple.png --strength 0.7 --out pear.png
      mix image.gen --prompt "a red apple" --image apple.png --variations 4 --out apples.png
      mix image.gen --list-models

  It uses the instance that the application runs (under the name `StarweaveImage`), or else one of its
  own for as long as it takes. `--device`, `--dtype` and a local folder as `--model` always mean one of
  its own. There a model that is named may be downloaded; an instance of the application loads what
  its configuration allows.

  ## Options

  Names may be written with `-` or `_`. A value that begins with `-` is written `--prompt=-text`.

  #{CommandLine.docs(@groups)}

  ## Exit codes

    * 0 - the image was made and written
    * 1 - it was not: generation failed or the file could not be written
    * 2 - wrong usage: an option is wrong, or the model is not known
    * 3 - image generation is not available: disabled, or Python cannot be started (see `mix image.setup`)
    * 129, 143 - ended by SIGHUP (a closed terminal) or SIGTERM

  An error is one line on stderr. However this ends, no Python process stays behind.

  Ctrl-C opens Erlang's break menu; pressed again it ends the command. With `ELIXIR_ERL_OPTIONS=+Bd` in the
  environment it ends it at once.
  """

  use Mix.Task

  @failed 1
  @usage 2
  @unavailable 3
  @exit_codes %{
    invalid_request: @usage,
    model_not_found: @usage,
    unavailable: @unavailable,
    disabled: @unavailable
  }
  @request Keyword.keys(to_draw ++ to_start ++ of_file)
  # One byte above the limit for a picture, so that a larger file is recognised as too large.
  @most_read 12 * 1024 * 1024 + 1
  @default_timeout_s 3_600
  @start_timeout_ms 600_000
  @tick_ms 200

  @impl true
  def run(argv), do: CommandLine.run(argv, &(&1 |> generate() |> ended()))

  defp generate(argv) do
    case parse(argv) do
      {:ok, %{help: true}} ->
        Mix.Task.run("help", ["image.gen"])
        :ok

      {:ok, opts} ->
        generate_with(opts)

      error ->
        error
    end
  end

  defp generate_with(opts) do
    with {:ok, job} <- job(opts) do
      # Messages on stdout would end up in the picture.
      opts = if Output.stdout?(opts[:out] || ""), do: Map.put(opts, :quiet, true), else: opts
      Mix.Task.run("app.start")
      unless opts[:verbose], do: Logger.configure(level: :warning)
      CommandLine.trap_signals(fn -> with_instance(job, opts, &perform(job, &1, opts)) end)
    end
  end

  defp ended(:ok), do: :ok
  defp ended({:signal, code}), do: exit({:shutdown, code})

  defp ended({:error, %Error{} = error}) do
    CommandLine.complain("[image.gen] Error: #{error.message}")
    exit({:shutdown, Map.get(@exit_codes, error.kind, @failed)})
  end

  ## The command line

  defp parse(argv) do
    case CommandLine.parse(argv, @groups, "image.gen") do
      {:ok, opts, []} ->
        {:ok, opts}

      {:ok, _opts, [text | _]} ->
        usage("unexpected #{inspect(text)}: put the text of --prompt in quotes")

      {:error, sentence} ->
        usage(sentence)
    end
  end

  # The job, checked as far as possible before Python is started.
  defp job(%{list_models: true} = opts) do
    with {:ok, instance} <- instance_options(opts), do: {:ok, %{instance: instance}}
  end

  defp job(opts) do
    out = Map.get(opts, :out, "image.png")

    with {:ok, prompt} <- prompt(opts),
         {:ok, format} <- format(opts, out),
         {:ok, instance} <- instance_options(opts),
         {:ok, timeout} <- timeout(opts),
         {:ok, opts} <- variations(opts),
         {:ok, files} <- files(opts),
         request = opts |> Map.take(@request) |> Map.merge(files),
         request = Map.merge(request, %{format: format, timeout: timeout, model: instance.model}),
         {:ok, _} <- Request.new(prompt, request),
         count = Map.get(request, :num_images, 1),
         {:ok, files} <- of_out(Output.plan(out, count, opts[:preview] == true)) do
      {:ok, %{prompt: prompt, request: request, files: files, instance: instance}}
    end
  end

  defp prompt(%{prompt: prompt}), do: {:ok, prompt}

  defp prompt(_opts),
    do:
      usage("--prompt is required, as in: mix image.gen --prompt \"a red apple\" --out apple.png")

  defp format(%{format: format}, _out), do: {:ok, format}

  defp format(_opts, out), do: of_out(Output.format(out))

  defp of_out({:error, sentence}), do: usage("--out " <> sentence)
  defp of_out(result), do: result

  defp variations(%{variations: _, num_images: _}),
    do: usage("--variations and --num-images are the same thing: name one of them")

  defp variations(%{variations: n, image: _} = opts),
    do: {:ok, opts |> Map.put(:num_images, n) |> Map.put_new(:strength, 0.6)}

  defp variations(%{variations: n} = opts), do: {:ok, Map.put(opts, :num_images, n)}
  defp variations(opts), do: {:ok, opts}

  defp files(opts) do
    Enum.reduce_while([:image, :mask, :images], {:ok, %{}}, fn name, {:ok, files} ->
      case opts |> Map.get(name) |> contents() do
        {:ok, nil} ->
          {:cont, {:ok, files}}

        {:ok, contents} ->
          {:cont, {:ok, Map.put(files, name, contents)}}

        {:error, reason} ->
          why = :file.format_error(reason)
          {:halt, usage("#{CommandLine.option(name)} cannot be read: #{why}")}
      end
    end)
  end

  defp contents(nil), do: {:ok, nil}
  defp contents([]), do: {:ok, []}

  defp contents([path | paths]) do
    with {:ok, file} <- contents(path),
         {:ok, files} <- contents(paths),
         do: {:ok, [file | files]}
  end

  defp contents(path), do: CommandLine.read(path, @most_read)

  defp timeout(opts) do
    case Map.get(opts, :timeout, @default_timeout_s) do
      seconds when seconds in 1..86_400 -> {:ok, seconds * 1_000}
      other -> usage("--timeout must be from 1 to 86400 seconds, got #{other}")
    end
  end

  # The options for an instance of our own, and whether the application's instance cannot be used.
  defp instance_options(opts) do
    start = Map.to_list(Map.take(opts, [:device, :dtype]))

    with {:ok, _checked} <- sidecar(start),
         {:ok, model, entries, folder?} <- model(opts[:model]) do
      {:ok, %{model: model, models: entries, start: start, own?: folder? or start != []}}
    end
  end

  defp sidecar(options) do
    with {:error, _field, message} <- Config.sidecar(options), do: usage("--" <> message)
  end

  defp model(nil), do: {:ok, nil, [], false}

  defp model(name) do
    cond do
      File.dir?(name) ->
        folder = Path.expand(name)
        base = folder |> Path.basename() |> String.replace(~r/[^A-Za-z0-9._-]/, "-")
        base = base |> String.trim_leading(".") |> String.slice(0, 200)
        id = "local/" <> if(base == "", do: "model", else: base)
        {:ok, id, [{id, path: folder}], true}

      String.starts_with?(name, [".", "/", "~"]) ->
        usage("--model must be a model's id or a folder that exists, got #{name}")

      true ->
        {:ok, name, [name], false}
    end
  end

  defp usage(message), do: {:error, Error.new(:invalid_request, message)}

  ## The instance

  defp with_instance(%{instance: wanted}, opts, fun) do
    note_ignored(opts)

    if Process.whereis(StarweaveImage) && not wanted.own?,
      do: fun.(StarweaveImage),
      else: with_own_instance(wanted, fun)
  end

  defp with_own_instance(wanted, fun) do
    # The application may have an instance running, so ours needs another name then.
    name = if Process.whereis(StarweaveImage), do: __MODULE__.Instance, else: StarweaveImage
    config = Application.get_env(:starweave_image, StarweaveImage, [])
    models = Keyword.get(config, :models, [])
    added = Enum.reject(wanted.models, &(&1 in Enum.map(models, fn m -> model_id(m) end)))

    start =
      config
      |> Keyword.merge(wanted.start)
      |> Keyword.merge(name: name, models: models ++ added, sidecars: 1)

    with {:ok, supervisor} <- start(start) do
      # If the instance ends, this process must survive to report the error.
      Process.unlink(supervisor)

      try do
        fun.(name)
      after
        stop(supervisor)
      end
    end
  end

  defp start(options) do
    StarweaveImage.start_link(options)
  rescue
    error in ArgumentError -> usage("wrong configuration: #{Exception.message(error)}")
  end

  defp model_id({id, _options}), do: id
  defp model_id(id), do: id

  defp stop(supervisor) do
    Supervisor.stop(supervisor, :shutdown)
  catch
    :exit, _already_gone -> :ok
  end

  defp note_ignored(opts) do
    if is_map_key(opts, :host) or is_map_key(opts, :port),
      do: say(opts, "Note: --host and --port are ignored, no server is needed")
  end

  ## The work

  defp perform(_job, instance, %{list_models: true} = opts) do
    # A pipe must get nothing but the table.
    bar = Progress.new(quiet: opts[:quiet] == true, plain: false)
    bar = Progress.show(bar, {:phase, "Starting Python"})
    result = await_start(instance, now() + @start_timeout_ms, bar)
    Progress.clear(bar)

    with :ok <- result,
         models when is_list(models) <- StarweaveImage.models(instance: instance),
         do: models |> table() |> Enum.each(&IO.puts/1)
  end

  defp perform(job, instance, opts) do
    say(opts, "Generating image...")
    monitor = Process.monitor(instance)

    with {:ok, id} <-
           StarweaveImage.submit(job.prompt, Map.put(job.request, :instance, instance)),
         :ok <- StarweaveImage.subscribe(id, instance: instance) do
      phase =
        if StarweaveImage.status(instance: instance).state == :starting,
          do: "Starting Python",
          else: "Waiting"

      images = length(job.files.paths)
      preview = job.files.preview
      bar = Progress.new(quiet: opts[:quiet] == true, preview: preview)
      bar = Progress.show(bar, {:phase, phase})

      try do
        with {:ok, images} <- receive_images({id, instance, monitor}, images, bar, []),
             do: save(images, job, opts)
      after
        if opts[:preview], do: File.rm(preview)
      end
    end
  end

  defp receive_images(_request, 0, bar, images) do
    Progress.clear(bar)
    {:ok, Enum.reverse(images)}
  end

  defp receive_images({id, instance, monitor} = request, left, bar, images) do
    receive do
      {:starweave_image, ^id, {:image, image}} ->
        receive_images(request, left - 1, bar, [image | images])

      {:starweave_image, ^id, {:error, error}} ->
        Progress.clear(bar)
        {:error, error}

      {:starweave_image, ^id, event} ->
        receive_images(request, left, Progress.show(bar, event), images)

      {:DOWN, ^monitor, _, _, _} ->
        Progress.clear(bar)
        {:error, Error.new(:internal, "image generation ended unexpectedly")}

      {:signal, code} ->
        Progress.clear(bar)
        # Without this, stopping Python would wait for the request.
        _ = StarweaveImage.cancel(id, instance: instance)
        {:signal, code}
    after
      @tick_ms -> receive_images(request, left, Progress.redraw(bar), images)
    end
  end

  # Waits in short intervals, to update the progress bar and to react to signals.
  defp await_start(instance, deadline, bar) do
    receive do
      {:signal, code} -> {:signal, code}
    after
      0 ->
        case StarweaveImage.await_ready(@tick_ms, instance: instance) do
          {:error, %Error{kind: :timeout}} ->
            if now() < deadline,
              do: await_start(instance, deadline, Progress.redraw(bar)),
              else: {:error, Error.new(:unavailable, "Python did not start in time")}

          settled ->
            settled
        end
    end
  end

  defp save(images, job, opts) do
    saved =
      images
      |> Enum.zip(job.files.paths)
      |> Enum.reduce_while(:ok, fn {image, path}, :ok ->
        case saved(image, path) do
          :ok ->
            say(opts, "Saved to #{path}")
            {:cont, :ok}

          {:error, reason} ->
            text = "#{path} cannot be written: #{:file.format_error(reason)}"
            {:halt, {:error, Error.new(:internal, text)}}

          signal ->
            {:halt, signal}
        end
      end)

    with :ok <- saved do
      Enum.each(images, &say(opts, "Metadata: #{inspect(Client.metadata(&1), limit: :infinity)}"))
      images |> Enum.flat_map(& &1.notices) |> Enum.uniq() |> Enum.each(&say(opts, "Note: #{&1}"))
    end
  end

  # Saved in a separate process, since writing to a pipe may wait for its reader for ever.
  defp saved(image, path) do
    Task.async(fn -> {:saved, Image.save(image, path)} end)

    receive do
      {reference, {:saved, result}} ->
        Process.demonitor(reference, [:flush])
        result

      {:signal, code} ->
        {:signal, code}
    end
  end

  defp table(models) do
    rows =
      for card <- models do
        size = "#{card.defaults.width}x#{card.defaults.height}"
        [card.id, Atom.to_string(card.state), Enum.join(card.tasks, ", "), size, card.licence]
      end

    rows = [["ID", "STATE", "TASKS", "SIZE", "LICENCE"] | rows]

    widths =
      rows
      |> Enum.zip_with(& &1)
      |> Enum.map(&(&1 |> Enum.map(fn c -> String.length(c) end) |> Enum.max()))

    for row <- rows do
      row
      |> Enum.zip(widths)
      |> Enum.map_join("  ", fn {cell, width} -> String.pad_trailing(cell, width) end)
      |> String.trim_trailing()
    end
  end

  defp say(%{quiet: true}, _line), do: :ok
  defp say(_opts, line), do: Mix.shell().info("[image.gen] " <> line)
  defp now, do: System.monotonic_time(:millisecond)
end
