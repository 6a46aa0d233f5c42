defmodule StarweaveImage.Mix.CommandLine do
  @moduledoc false

  # What all Mix tasks of this library share: arguments are the bytes that were typed, switches come from a schema, a
  # signal ends the work in order, and a failing output (`| head`, a full disk, a stream that was closed from the start)
  # loses no work.

  alias StarweaveImage.{Options, Type}

  # How OptionParser reads its value, what stands for that in the help, and a sentence.
  @type switch :: {reader :: atom | [atom], String.t() | nil, String.t()}
  @type groups :: [{title :: String.t(), [{name :: atom, switch}]}]

  @signals [sighup: 129, sigterm: 143]
  # How long the end of the VM waits for ours, which stops Python first.
  @signal_grace_ms 9_000

  @doc "Calls `fun` with the arguments of a task; failures to print are ignored during the call."
  @spec run([String.t()], ([String.t()] -> result)) :: result when result: term
  def run(argv, fun) do
    leader = Process.group_leader()
    without_locale? = :file.native_name_encoding() == :latin1
    # So that arguments are also printed as they were typed.
    if without_locale?,
      do: for(device <- [leader, :standard_error], do: :io.setopts(device, encoding: :unicode))

    # It stays after the call, since processes that were started during it keep it as their group leader.
    Process.group_leader(self(), spawn(fn -> forward(leader) end))

    try do
      typed = if without_locale?, do: System.argv(), else: []
      fun.(Enum.map(argv, &if(&1 in typed, do: bytes(&1), else: &1)))
    after
      Process.group_leader(self(), leader)
    end
  end

  @doc "Prints a line on the standard error, if there is one."
  @spec complain(String.t()) :: :ok
  def complain(line) do
    Mix.shell().error(line)
  rescue
    _gone in [ErlangError, ArgumentError] -> :ok
  end

  @doc """
  Switches for the fields of a group of a schema, with its ranges and sentences.

      iex> fields = [steps: {{:integer, 1, 200}, nil, :sent, "Denoise steps."}]
      iex> StarweaveImage.Mix.CommandLine.switches(fields)
      [steps: {:integer, "N", "an integer from 1 to 200. Denoise steps."}]
  """
  @spec switches([{atom, Options.field()}]) :: [{atom, switch}]
  def switches(fields) do
    for {name, {type, default, _role, doc}} <- fields do
      doc =
        Regex.replace(
          ~r/`:(\w+)`/,
          doc,
          &if(fields[String.to_atom(&2)], do: "`#{option(&2)}`", else: &1)
        )

      default = default(name, default)
      {reader, value} = read_as(type, name)
      range = if type == :boolean, do: "", else: Type.describe(type) <> ". "
      {name, {reader, value, range <> doc <> default}}
    end
  end

  defp default(_name, default) when default in [nil, false], do: ""
  defp default(name, true), do: " `#{option("no_#{name}")}` says no."
  defp default(_name, default), do: " Default: `#{default}`."

  defp read_as(:boolean, _name), do: {:boolean, nil}
  defp read_as(:image, _name), do: {:string, "FILE"}
  defp read_as({:described, _words, {:some, :image, _max}}, _name), do: {[:string, :keep], "FILE"}
  defp read_as({:text, _min, _max}, _name), do: {:string, "TEXT"}
  defp read_as({:number, _min, _max}, _name), do: {:float, "X"}
  defp read_as({:one_of, _atoms}, name), do: {:string, capitals(name)}
  defp read_as(type, name) when is_atom(type), do: {:string, capitals(name)}
  defp read_as(_integer, _name), do: {:integer, "N"}

  defp capitals(name), do: name |> Atom.to_string() |> String.upcase()

  @doc """
  The switches as Markdown, each group under a heading.

      iex> StarweaveImage.Mix.CommandLine.docs([{"Size", [max_width: {:integer, "N", "Pixels."}]}])
      "### Size\\n\\n  * `--max-width N` - Pixels."
  """
  @spec docs(groups) :: String.t()
  def docs(groups) do
    Enum.map_join(groups, "\n\n", fn {title, switches} ->
      lines =
        for {name, {_reader, value, doc}} <- switches,
            do: "  * `#{option(name)}#{value && " " <> value}` - #{doc}"

      Enum.join(["### #{title}\n" | lines], "\n")
    end)
  end

  @doc """
  How a switch is written.

      iex> StarweaveImage.Mix.CommandLine.option(:num_images)
      "--num-images"
  """
  @spec option(atom | String.t()) :: String.t()
  def option(name), do: "--" <> String.replace(to_string(name), "_", "-")

  @doc """
  The switches of a command line by their names, and what is none of them; or what is wrong. What may be said again is a
  list.

      iex> groups = [{"Size", [max_width: {:integer, "N", "Pixels."}]}]
      iex> StarweaveImage.Mix.CommandLine.parse(["--max_width", "64"], groups, "image.gen")
      {:ok, %{max_width: 64}, []}
      iex> StarweaveImage.Mix.CommandLine.parse(["--maxwidth", "64"], groups, "image.gen")
      {:error, "unknown option --maxwidth, did you mean --max-width?"}
  """
  @spec parse([String.t()], groups, task :: String.t()) ::
          {:ok, %{atom => term}, rest :: [String.t()]} | {:error, String.t()}
  def parse(argv, groups, task) do
    switches = Enum.flat_map(groups, &elem(&1, 1))
    strict = for {name, {reader, _value, _doc}} <- switches, do: {name, reader}

    {opts, rest, invalid} = argv |> Enum.map(&hyphenated/1) |> OptionParser.parse(strict: strict)

    case invalid do
      [] -> {:ok, named(opts, strict), rest}
      [{name, value} | _] -> {:error, wrong(name, value, switches, task)}
    end
  end

  defp named(opts, strict) do
    Map.new(opts, fn {name, value} ->
      if is_list(strict[name]), do: {name, Keyword.get_values(opts, name)}, else: {name, value}
    end)
  end

  # OptionParser knows the spelling with hyphens only, and takes the other for an unknown option.
  defp hyphenated("--" <> option) do
    [name | value] = String.split(option, "=", parts: 2)
    Enum.join([option(name) | value], "=")
  end

  defp hyphenated(argument), do: argument

  defp wrong(name, value, switches, task) do
    key = name |> String.trim_leading("-") |> String.replace_prefix("no-", "")

    case Enum.find(switches, fn {known, _} -> option(known) == "--" <> key end) do
      nil ->
        known = for {name, _} <- switches, do: String.trim_leading(option(name), "-")

        case Options.nearest(key, known) do
          nil -> "unknown option #{name}, see `mix help #{task}`"
          near -> "unknown option #{name}, did you mean --#{near}?"
        end

      {_known, {:boolean, _, _}} ->
        "#{name} takes no value"

      {_known, {_reader, what, _}} when value == nil ->
        "#{name} needs a value (#{what})"

      {_known, {reader, _, _}} ->
        kind = if reader == :integer, do: "an integer", else: "a number"
        "#{name} must be #{kind}, got #{inspect(value)}"
    end
  end

  @doc """
  The bytes of a file, at most so many of them, also of one that has no end, such as a device. A pipe gives what it has,
  piece by piece.

      iex> StarweaveImage.Mix.CommandLine.read("mix.exs", 9)
      {:ok, "defmodule"}
  """
  @spec read(Path.t(), pos_integer) :: {:ok, binary} | {:error, :file.posix()}
  def read(path, most) do
    with {:ok, file} <- :file.open(path, [:read, :raw, :binary]) do
      result = read(file, most, "")
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

  @doc """
  Calls `fun`, to which signals come as messages `{:signal, exit_code}`; its result may be that tuple.

  The handler of a signal waits, since the VM's own reaction comes after it: for SIGTERM a stop, which does not know the
  exit code and would not end Python before the port.
  """
  @spec trap_signals((... -> result)) :: result | {:signal, pos_integer} when result: term
  def trap_signals(fun) do
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
        # A signal that came too late for the work: its handler waits all the same, and could not be taken back.
        receive do
          {:signal, code} -> {:signal, code}
        after
          0 ->
            Enum.each(ids, fn {signal, id} -> System.untrap_signal(signal, id) end)
            result
        end
    end
  end

  # Each byte has become a character of its own.
  defp bytes(argument) do
    case :unicode.characters_to_binary(argument, :utf8, :latin1) do
      bytes when is_binary(bytes) -> bytes
      _no_bytes -> argument
    end
  end

  # A group leader in front of another one, which hides failures to print.
  defp forward(leader) do
    receive do
      {:io_request, from, reference, request} ->
        send(from, {:io_reply, reference, forwarded(leader, request)})

      _other ->
        :ok
    end

    forward(leader)
  end

  defp forwarded(leader, request) do
    monitor = Process.monitor(leader)
    send(leader, {:io_request, self(), monitor, request})

    receive do
      {:io_reply, ^monitor, reply} ->
        Process.demonitor(monitor, [:flush])
        if print?(request) and match?({:error, _}, reply), do: lost(), else: reply

      {:DOWN, ^monitor, _, _, _} ->
        if print?(request), do: lost(), else: {:error, :terminated}
    end
  end

  defp print?(request), do: elem(request, 0) in [:put_chars, :requests]

  # The console of Logger prints to the same place, and would say at length that it cannot.
  defp lost do
    if Process.whereis(:user) == nil, do: Logger.configure(level: :none)
    :ok
  end
end
