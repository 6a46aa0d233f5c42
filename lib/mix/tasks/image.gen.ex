defmodule Mix.Tasks.Image.Gen do
  @shortdoc "Generates an image from a text"

  @switches [
    prompt: {:string, "TEXT", "what to draw; required"},
    out: {:string, "FILE", "where to write it (default: image.png); several images are numbered"},
    model: {:string, "MODEL", "a model's id, or a local folder in diffusers layout"},
    width: {:integer, "PIXELS", "a multiple of 8 (default: the model's own)"},
    height: {:integer, "PIXELS", "a multiple of 8 (default: the model's own)"},
    steps: {:integer, "N", "denoise steps (default: the model's own)"},
    guidance_scale:
      {:float, "X", "how closely the prompt is followed (default: the model's own)"},
    negative_prompt: {:string, "TEXT", "what the image should not show"},
    seed: {:integer, "N", "the same seed gives the same image (default: a fresh one)"},
    style: {:string, "TEXT", "added to the prompt after a comma"},
    image: {:string, "FILE", "a picture to start from: PNG, JPEG or WebP"},
    mask: {:string, "FILE", "where the picture may change: white in it, and of the same size"},
    strength:
      {:float, "X", "0 to 1, how far the picture may be left (default: 0.8; variations: 0.6)"},
    scheduler:
      {:string, "NAME", "such as `DPM++ 2M Karras` or `euler_a` (default: the model's own)"},
    num_images: {:integer, "N", "1 to 16 images, with consecutive seeds (default: 1)"},
    variations: {:integer, "N", "N variations of `--image`, or else of the prompt"},
    variation_strength:
      {:float, "X", "0 to 1, how far variations of the prompt go from the picture of `--seed`"},
    variation_seed:
      {:integer, "N",
       "where the first of them goes to, the others to N + 1 … (default: `--seed`)"},
    format: {:string, "FORMAT", "`png`, `jpeg` or `webp` (default: what `--out` ends in)"},
    quality: {:integer, "N", "1 to 100, for JPEG and WebP (default: 90)"},
    preview:
      {:boolean, nil,
       "show how the image forms in a file beside `--out`, such as `image.preview.jpg`, removed at the end"},
    metadata: {:boolean, nil, "`--no-metadata` leaves the parameters out of the file"},
    timeout: {:integer, "SECONDS", "give up after so long, loading included (default: 3600)"},
    device: {:string, "DEVICE", "`auto`, `cpu`, `cuda`, `cuda:N`, `mps` or `xpu`"},
    dtype: {:string, "TYPE", "`auto`, `float32`, `bfloat16` or `float16`"},
    list_models: {:boolean, nil, "list the models instead, and generate nothing"},
    quiet: {:boolean, nil, "say nothing but errors"},
    verbose: {:boolean, nil, "show the log of the Python process"},
    host: {:string, "HOST", "accepted for compatibility and ignored: there is no server"},
    port: {:integer, "PORT", "as `--host`"}
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

  #{Enum.map_join(@switches, "\n", fn {name, {_type, value, doc}} -> "  * `--#{name}#{value && " " <> value}` - #{doc}" end)}

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

  alias StarweaveImage.{Client, Error, Image, Options, Output, Request}
  alias StarweaveImage.Mix.CommandLine

  @failed 1
  @usage 2
  @unavailable 3
  @exit_codes %{
    invalid_request: @usage,
    model_not_found: @usage,
    unavailable: @unavailable,
    disabled: @unavailable
  }
  @signals [sighup: 129, sigterm: 143]
  # How long the end of the VM waits for ours, which stops Python first.
  @signal_grace_ms 9_000

  @not_in_request [
    :prompt,
    :out,
    :variations,
    :list_models,
    :quiet,
    :verbose,
    :host,
    :port,
    :device,
    :dtype
  ]
  # One byte more than a picture may have, so that a larger one is seen to be too large.
  @most_read 12 * 1024 * 1024 + 1
  @default_timeout_s 3_600
  @start_timeout_ms 600_000
  @tick_ms 200

  @impl true
  def run(argv), do: CommandLine.run(argv, &generate/1)

  defp generate(argv) do
    with {:ok, opts} <- parse(argv),
         {:ok, job} <- job(opts) do
      # What is said would stand in the picture.
      opts = if Output.stdout?(opts[:out] || ""), do: Map.put(opts, :quiet, true), else: opts
      Mix.Task.run("app.start")
      unless opts[:verbose], do: Logger.configure(level: :warning)
      trap_signals(fn -> with_instance(job, opts, &perform(job, &1, opts)) end)
    end
    |> case do
      :ok ->
        :ok

      {:error, %Error{} = error} ->
        CommandLine.complain("[image.gen] Error: #{error.message}")
        exit({:shutdown, Map.get(@exit_codes, error.kind, @failed)})

      {:signal, code} ->
        exit({:shutdown, code})
    end
  end

  ## The command line

  defp parse(argv) do
    switches = for {name, {type, _value, _doc}} <- @switches, do: {name, type}

    {opts, rest, invalid} =
      argv |> Enum.map(&hyphenated/1) |> OptionParser.parse(strict: switches)

    case {invalid, rest} do
      {[], []} -> {:ok, Map.new(opts)}
      {[{name, value} | _], _} -> usage(wrong_option(name, value))
      {[], [text | _]} -> usage("unexpected #{inspect(text)}: put the text of --prompt in quotes")
    end
  end

  # OptionParser knows the spelling with hyphens only, and takes the other for an unknown option.
  defp hyphenated("--" <> option) do
    [name | value] = String.split(option, "=", parts: 2)
    Enum.join(["--" <> String.replace(name, "_", "-") | value], "=")
  end

  defp hyphenated(argument), do: argument

  defp wrong_option(name, value) do
    key = name |> String.trim_leading("-") |> String.replace_prefix("no-", "")

    case Enum.find(@switches, fn {known, _} -> option(known) == "--" <> key end) do
      nil ->
        known = for {name, _} <- @switches, do: String.trim_leading(option(name), "-")

        case Options.nearest(key, known) do
          nil -> "unknown option #{name}, see `mix help image.gen`"
          near -> "unknown option #{name}, did you mean --#{near}?"
        end

      {_known, {:boolean, _, _}} ->
        "#{name} takes no value"

      {_known, {_type, what, _}} when value == nil ->
        "#{name} needs a value (#{what})"

      {_known, {type, _, _}} ->
        kind = if type == :integer, do: "an integer", else: "a number"
        "#{name} must be #{kind}, got #{inspect(value)}"
    end
  end

  defp option(name), do: "--" <> String.replace(Atom.to_string(name), "_", "-")

  # What is to be done, checked as far as it can be before Python is started.
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
         request = opts |> Map.drop(@not_in_request) |> Map.merge(files),
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
    Enum.reduce_while([:image, :mask], {:ok, %{}}, fn name, {:ok, files} ->
      with path when path != nil <- opts[name],
           {:ok, bytes} <- read(path) do
        {:cont, {:ok, Map.put(files, name, bytes)}}
      else
        nil ->
          {:cont, {:ok, files}}

        {:error, reason} ->
          {:halt, usage("#{option(name)} cannot be read: #{:file.format_error(reason)}")}
      end
    end)
  end

  # Also of what has no end, such as a device; a pipe gives what it has, piece by piece.
  defp read(path) do
    with {:ok, file} <- :file.open(path, [:read, :raw, :binary]) do
      result = read(file, @most_read, "")
      _ = :file.close(file)
      result
    end
  end

  defp read(_file, 0, bytes), do: {:ok, bytes}

  defp read(file, left, bytes) do
    case :file.read(file, left) do
      {:ok, more} -> read(file, left - byte_size(more), bytes <> more)
      :eof -> {:ok, bytes}
      error -> error
    end
  end

  defp timeout(opts) do
    case Map.get(opts, :timeout, @default_timeout_s) do
      seconds when seconds in 1..86_400 -> {:ok, seconds * 1_000}
      other -> usage("--timeout must be from 1 to 86400 seconds, got #{other}")
    end
  end

  # What an instance needs to be started with, and whether another than ours cannot do.
  defp instance_options(opts) do
    with :ok <- one_of(opts, :device, ~r/\A(auto|cpu|cuda(:\d+)?|mps|xpu)\z/),
         :ok <- one_of(opts, :dtype, ~r/\A(auto|float32|bfloat16|float16)\z/),
         {:ok, model, entries, folder?} <- model(opts[:model]) do
      start = Map.to_list(Map.take(opts, [:device, :dtype]))
      {:ok, %{model: model, models: entries, start: start, own?: folder? or start != []}}
    end
  end

  defp one_of(opts, name, allowed) do
    if Regex.match?(allowed, Map.get(opts, name, "auto")) do
      :ok
    else
      {_type, _value, doc} = @switches[name]
      usage("#{option(name)} must be #{String.replace(doc, "`", "")}, got #{inspect(opts[name])}")
    end
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
    # Beside an instance of the application, if there is one.
    name = if Process.whereis(StarweaveImage), do: __MODULE__.Instance, else: StarweaveImage
    config = Application.get_env(:starweave_image, StarweaveImage, [])
    models = Keyword.get(config, :models, [])
    added = Enum.reject(wanted.models, &(&1 in Enum.map(models, fn m -> model_id(m) end)))

    start =
      config
      |> Keyword.merge(wanted.start)
      |> Keyword.merge(name: name, models: models ++ added, sidecars: 1)

    with {:ok, supervisor} <- start(start) do
      # Its end must not be ours: it is an error to report.
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

  # A signal becomes a message. Its handler waits, since the VM's own reaction comes after it: for
  # SIGTERM a stop, which does not know the exit code and would not end Python before the port.
  defp trap_signals(fun) do
    main = self()

    ids =
      for {signal, code} <- @signals,
          {:ok, id} <- [
            System.trap_signal(signal, fn ->
              send(main, {:signal, code})
              Process.sleep(@signal_grace_ms)
              :ok
            end)
          ],
          do: {signal, id}

    case fun.() do
      {:signal, code} ->
        {:signal, code}

      result ->
        # One that came too late for the work: its handler waits all the same, and could not be taken back.
        receive do
          {:signal, code} -> {:signal, code}
        after
          0 ->
            Enum.each(ids, fn {signal, id} -> System.untrap_signal(signal, id) end)
            result
        end
    end
  end

  ## The work

  defp perform(_job, instance, %{list_models: true} = opts) do
    bar = new_bar(opts)
    # In a pipe there is to be the table alone.
    bar = if bar.mode == :plain, do: %{bar | mode: :silent}, else: bar
    bar = show(bar, {:phase, "Starting Python"})
    result = await_start(instance, now() + @start_timeout_ms, bar)
    clear(bar)

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
      bar = show(%{new_bar(opts) | preview: preview}, {:phase, phase})

      try do
        with {:ok, images} <- receive_images({id, instance, monitor}, images, bar, []),
             do: save(images, job, opts)
      after
        if opts[:preview], do: File.rm(preview)
      end
    end
  end

  defp receive_images(_request, 0, bar, images) do
    clear(bar)
    {:ok, Enum.reverse(images)}
  end

  defp receive_images({id, instance, monitor} = request, left, bar, images) do
    receive do
      {:starweave_image, ^id, {:image, image}} ->
        receive_images(request, left - 1, bar, [image | images])

      {:starweave_image, ^id, {:error, error}} ->
        clear(bar)
        {:error, error}

      {:starweave_image, ^id, event} ->
        receive_images(request, left, show(bar, event), images)

      {:DOWN, ^monitor, _, _, _} ->
        clear(bar)
        {:error, Error.new(:internal, "image generation ended unexpectedly")}

      {:signal, code} ->
        clear(bar)
        # Else the end of Python would wait for the request.
        _ = StarweaveImage.cancel(id, instance: instance)
        {:signal, code}
    after
      @tick_ms -> receive_images(request, left, redraw(bar), images)
    end
  end

  # In pieces, to draw how long it takes and to hear a signal.
  defp await_start(instance, deadline, bar) do
    receive do
      {:signal, code} -> {:signal, code}
    after
      0 ->
        case StarweaveImage.await_ready(@tick_ms, instance: instance) do
          {:error, %Error{kind: :timeout}} ->
            if now() < deadline,
              do: await_start(instance, deadline, redraw(bar)),
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

  # In a process of its own, since a pipe may wait for its reader for ever.
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

  ## Progress: one line that is drawn over on a terminal, a few plain lines elsewhere

  defp new_bar(opts) do
    mode =
      cond do
        opts[:quiet] -> :silent
        IO.ANSI.enabled?() -> :terminal
        true -> :plain
      end

    %{
      mode: mode,
      text: nil,
      detail: nil,
      since: now(),
      drawn: nil,
      preview: nil,
      previewed?: false
    }
  end

  defp show(bar, {:phase, text}), do: change(bar, text, nil)

  defp show(bar, {:queued, %{attempt: attempt}}) when attempt > 1,
    do: change(bar, "Python ended, starting it again", nil)

  defp show(bar, {:queued, %{position: 1}}), do: bar

  defp show(bar, {:queued, %{position: n}}),
    do: change(bar, "Waiting, number #{n} in the queue", nil)

  defp show(bar, {:progress, %{phase: :loading}}), do: change(bar, "Loading the model", nil)

  defp show(bar, {:progress, %{phase: :denoising} = progress}) do
    text =
      if progress.num_images > 1,
        do: "Denoising image #{progress.image + 1} of #{progress.num_images}",
        else: "Denoising"

    change(bar, text, progress)
  end

  defp show(bar, {:progress, %{phase: phase}}),
    do: change(bar, phase |> Atom.to_string() |> String.capitalize(), nil)

  defp show(bar, {:preview, preview}) do
    # One that cannot be written is no reason to stop: the image may yet be.
    case Output.write(bar.preview, preview.data) do
      :ok -> announce_preview(bar)
      {:error, _reason} -> bar
    end
  end

  defp show(bar, _event), do: bar

  defp announce_preview(%{previewed?: false, mode: mode} = bar) when mode != :silent do
    clear(bar)
    Mix.shell().info("[image.gen] Preview in #{bar.preview}, until the end")
    # The bar of a terminal was cleared for that line, a plain line stands.
    redraw(%{bar | previewed?: true, drawn: if(mode == :plain, do: bar.drawn)})
  end

  defp announce_preview(bar), do: bar

  defp change(bar, text, detail) do
    bar = if bar.text == text, do: bar, else: %{bar | text: text, since: now()}
    redraw(%{bar | detail: detail})
  end

  defp redraw(%{mode: :silent} = bar), do: bar

  defp redraw(bar) do
    line = if bar.mode == :terminal, do: bar_line(bar), else: plain_line(bar)

    if line == bar.drawn do
      bar
    else
      if bar.mode == :terminal,
        do: IO.write(["\r\e[K", line]),
        else: Mix.shell().info("[image.gen] " <> line)

      %{bar | drawn: line}
    end
  end

  defp clear(%{mode: :terminal}), do: IO.write("\r\e[K")
  defp clear(_bar), do: :ok

  defp bar_line(%{detail: nil} = bar) do
    seconds = div(now() - bar.since, 1_000)
    fit(if seconds > 0, do: "#{bar.text}... #{seconds} s", else: "#{bar.text}...")
  end

  defp bar_line(%{detail: %{step: step, steps: steps} = progress} = bar) do
    eta = if progress.eta_ms, do: " #{seconds(progress.eta_ms)} left", else: ""
    tail = " #{step}/#{steps}#{eta}"
    width = min(columns() - String.length(bar.text <> tail) - 4, 40)
    filled = if width > 4, do: div(width * step, max(steps, 1)), else: 0

    if width > 4,
      do:
        "#{bar.text} [#{String.duplicate("#", filled)}#{String.duplicate(".", width - filled)}]#{tail}",
      else: fit(bar.text <> tail)
  end

  # At most ten lines of steps for an image, however many steps it has.
  defp plain_line(%{detail: nil} = bar), do: bar.text <> "..."

  defp plain_line(%{detail: %{step: step, steps: steps}} = bar) do
    tenth = div(step * 10, max(steps, 1))
    shown = div(tenth * steps + 9, 10)
    "#{bar.text}, step #{shown}/#{steps}"
  end

  defp seconds(ms), do: "#{div(ms + 999, 1_000)} s"
  defp fit(line), do: String.slice(line, 0, max(columns() - 1, 10))

  defp columns do
    case :io.columns() do
      {:ok, columns} -> columns
      {:error, _} -> 80
    end
  end

  defp say(%{quiet: true}, _line), do: :ok
  defp say(_opts, line), do: Mix.shell().info("[image.gen] " <> line)
  defp now, do: System.monotonic_time(:millisecond)
end
