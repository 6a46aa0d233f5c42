defmodule StarweaveImage.Options do
  @moduledoc false

  # A schema is a keyword list of `name: {type, default, doc}`. Validation and documentation come from the same schema,
  # so they cannot differ. The large schemas (`Schema`, `Config`) have groups, and a role for each field: `:sent` fields
  # go to the sidecar, under the same name, to which `_ms` is appended if they are in milliseconds.

  alias StarweaveImage.Type

  @type schema :: [{name :: atom, {Type.t(), default :: term, doc :: String.t()}}]
  @type groups :: [{title :: String.t(), [{name :: atom, field}]}]
  @type field :: {Type.t(), default :: term, role :: atom, doc :: String.t()}

  # Jaro distance: typing errors and parts of a name are above it, other words below.
  @near 0.77

  @doc """
  Every option of the schema with its given or default value; nil counts as not given.

  If a name is given more than once, the first one counts, as in `Keyword.get/2`.

      iex> schema = [steps: {{:integer, 1, 200}, 20, "Denoise steps."}]
      iex> StarweaveImage.Options.validate([], schema)
      {:ok, %{steps: 20}}
      iex> StarweaveImage.Options.validate([step: 5], schema)
      {:error, :step, "unknown option :step, did you mean :steps?"}
  """
  @spec validate(keyword | map, schema) ::
          {:ok, %{atom => term}} | {:error, field :: term, message :: String.t()}
  def validate(opts, schema) do
    with {:ok, given} <- given(opts),
         :ok <- known(Map.keys(given), Keyword.keys(schema)) do
      Enum.reduce_while(schema, {:ok, %{}}, fn {name, {type, default, _doc}}, {:ok, values} ->
        case check(name, type, Map.get(given, name)) do
          {:ok, nil} -> {:cont, {:ok, Map.put(values, name, default)}}
          {:ok, value} -> {:cont, {:ok, Map.put(values, name, value)}}
          error -> {:halt, error}
        end
      end)
    end
  end

  @doc """
  Casts one value to its type; nil stays nil.

      iex> StarweaveImage.Options.check(:steps, {:integer, 1, 200}, 0)
      {:error, :steps, "steps must be an integer from 1 to 200, got 0"}
  """
  @spec check(atom, Type.t(), term) :: {:ok, term} | {:error, atom, String.t()}
  def check(_name, _type, nil), do: {:ok, nil}

  def check(name, type, value) do
    with :error <- Type.cast(type, value),
         do: {:error, name, "#{name} must be #{Type.describe(type)}, got #{shown(value)}"}
  end

  defp given(opts) when is_map(opts) and not is_struct(opts), do: {:ok, opts}

  defp given(opts) do
    if Keyword.keyword?(opts),
      do: {:ok, opts |> Enum.reverse() |> Map.new()},
      else: {:error, nil, "options must be a keyword list or a map, got #{shown(opts)}"}
  end

  defp known(names, known) do
    case names -- known do
      [] ->
        :ok

      [unknown | _] ->
        {:error, unknown, "unknown option #{shown(unknown)}#{hint(unknown, known)}"}
    end
  end

  defp hint(unknown, known) when is_atom(unknown) or is_binary(unknown) do
    case nearest(to_string(unknown), known) do
      nil -> ""
      name -> ", did you mean #{inspect(name)}?"
    end
  end

  defp hint(_unknown, _known), do: ""

  @doc """
  The one of `known` that was probably meant, or nil if none is close: a far-fetched guess would mislead.

      iex> StarweaveImage.Options.nearest("widht", [:width, :height])
      :width
  """
  @spec nearest(String.t(), [name, ...]) :: name | nil when name: atom | String.t()
  def nearest(unknown, _known) when byte_size(unknown) > 64, do: nil

  def nearest(unknown, known) do
    {distance, name} =
      known |> Enum.map(&{String.jaro_distance(unknown, to_string(&1)), &1}) |> Enum.max()

    if distance >= @near, do: name
  end

  # Long text from users is shortened.
  defp shown(value) when is_binary(value) do
    cond do
      not String.valid?(value) -> "#{byte_size(value)} bytes"
      String.printable?(value) and String.length(value) <= 32 -> inspect(value)
      true -> "#{byte_size(value)} bytes of text"
    end
  end

  defp shown(value) when is_integer(value) and abs(value) > 0xFFFFFFFFFFFFFFFF,
    do: "an integer of more than 64 bits"

  defp shown(value) when is_number(value) or is_atom(value), do: inspect(value)
  defp shown(value) when is_list(value), do: "a list"
  defp shown(%module{}), do: "a #{inspect(module)}"
  defp shown(value) when is_map(value), do: "a map"
  defp shown(_value), do: "something else"

  @doc """
  The groups' fields as one flat schema.

      iex> StarweaveImage.Options.schema([{"Size", width: {{:integer, 1, 9}, 5, :sent, "Pixels."}}])
      [width: {{:integer, 1, 9}, 5, "Pixels."}]
  """
  @spec schema(groups) :: schema
  def schema(groups) do
    for {_title, fields} <- groups, {name, {type, default, _role, doc}} <- fields do
      {name, {type, default, doc}}
    end
  end

  @doc """
  The fields with this role: their names, names on the wire, and types.

      iex> groups = [{"Time", timeout: {{:ms, 1, 9}, 5, :sent, ""}, id: {:id, nil, :kept, ""}}]
      iex> StarweaveImage.Options.with_role(groups, :sent)
      [{:timeout, :timeout_ms, {:ms, 1, 9}}]
  """
  @spec with_role(groups, atom) :: [{name :: atom, wire_name :: atom, Type.t()}]
  def with_role(groups, role) do
    for {_title, fields} <- groups, {name, {type, _default, ^role, _doc}} <- fields do
      {name, if(match?({:ms, _, _}, type), do: :"#{name}_ms", else: name), type}
    end
  end

  @doc """
  The typespec of one given option: its name and the type of its value.

      iex> schema = [steps: {{:integer, 1, 200}, nil, ""}, metadata: {:boolean, true, ""}]
      iex> schema |> StarweaveImage.Options.given_spec() |> Macro.to_string()
      "{:steps, 1..200 | nil} | {:metadata, boolean() | nil}"
  """
  @spec given_spec(schema) :: Macro.t()
  def given_spec(schema) do
    Type.union(
      for {name, {type, _default, _doc}} <- schema,
          do: {name, Type.union([Type.spec(type, :given), nil])}
    )
  end

  @doc """
  A schema as a Markdown list, or its groups as such lists under headings.

      iex> StarweaveImage.Options.docs(steps: {{:integer, 1, 200}, 20, "Denoise steps."})
      "  * `:steps` - an integer from 1 to 200. Denoise steps. Default: `20`."
  """
  @spec docs(schema | groups) :: String.t()
  def docs([{title, _fields} | _] = groups) when is_binary(title) do
    Enum.map_join(groups, "\n\n", fn {title, fields} ->
      "### #{title}\n\n" <> docs(schema([{title, fields}]))
    end)
  end

  def docs(schema) do
    Enum.map_join(schema, "\n", fn {name, {type, default, doc}} ->
      default = if default in [nil, []], do: "", else: " Default: `#{inspect(default)}`."
      "  * `:#{name}` - #{Type.describe(type)}. #{doc}#{default}"
    end)
  end
end
