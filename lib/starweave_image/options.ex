defmodule StarweaveImage.Options do
  @moduledoc false

  # A schema is a keyword list of `name: {type, default, doc}`. It validates options and is their
  # documentation, so that the two cannot differ; `describe/1` completes "name must be …".

  @type type ::
          :boolean
          | :atom
          | :prompt
          | :id
          | :model_id
          | :scheduler
          | :image
          | :wait
          | {:integer, integer, integer}
          | {:multiple_of, pos_integer, integer, integer}
          | {:number, number, number}
          | {:text, min_bytes :: non_neg_integer, max_bytes :: pos_integer}
          | {:one_of, [atom]}
          | {:list, type, max :: pos_integer}
          | {:custom, description :: String.t(), (term -> {:ok, term} | :error)}
  @type schema :: [{atom, {type, default :: term, doc :: String.t()}}]

  @max_prompt 8_192
  @max_image 12 * 1024 * 1024
  # What a timer of the BEAM takes, in ms.
  @longest_wait 0xFFFFFFFF
  # Jaro distance: slips of the fingers and parts of a name are above it, other words below.
  @near 0.77

  @doc """
  Every option of the schema with its value, given or default; a nil counts as not given.

  Of equal names the first one counts, as in `Keyword.get/2`.
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

  @doc "One value as its type wants it, nil as it is."
  @spec check(atom, type, term) :: {:ok, term} | {:error, atom, String.t()}
  def check(_name, _type, nil), do: {:ok, nil}

  def check(name, type, value) do
    case cast(type, value) do
      {:ok, value} -> {:ok, value}
      :error -> {:error, name, "#{name} must be #{describe(type)}, got #{shown(value)}"}
    end
  end

  @doc "The schema as a Markdown list."
  @spec docs(schema) :: String.t()
  def docs(schema) do
    Enum.map_join(schema, "\n", fn {name, {type, default, doc}} ->
      default = if default == nil, do: "", else: " Default: `#{inspect(default)}`."
      "  * `:#{name}` - #{describe(type)}. #{doc}#{default}"
    end)
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

  @doc "The one of `known` that was probably meant, or nil: a far guess leads astray."
  @spec nearest(String.t(), [name, ...]) :: name | nil when name: atom | String.t()
  def nearest(unknown, _known) when byte_size(unknown) > 64, do: nil

  def nearest(unknown, known) do
    {distance, name} =
      known |> Enum.map(&{String.jaro_distance(unknown, to_string(&1)), &1}) |> Enum.max()

    if distance >= @near, do: name
  end

  defp cast(:boolean, value) when is_boolean(value), do: {:ok, value}
  defp cast(:atom, value) when is_atom(value) and not is_boolean(value), do: {:ok, value}

  defp cast({:integer, min, max}, value)
       when is_integer(value) and value >= min and value <= max,
       do: {:ok, value}

  defp cast({:multiple_of, n, min, max}, value)
       when is_integer(value) and value >= min and value <= max and rem(value, n) == 0,
       do: {:ok, value}

  # Minus zero becomes zero, for whoever reads it later.
  defp cast({:number, min, max}, value) when is_number(value) and value >= min and value <= max,
    do: {:ok, value + 0.0}

  defp cast({:text, min, max}, value)
       when is_binary(value) and byte_size(value) >= min and byte_size(value) <= max,
       do: accept(value, String.valid?(value) and not String.contains?(value, "\0"))

  defp cast(:prompt, value) do
    with {:ok, value} <- cast({:text, 1, @max_prompt}, value),
         do: accept(value, String.trim(value) != "")
  end

  defp cast(:id, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A[A-Za-z0-9._:-]{1,128}\z/)

  defp cast(:model_id, value) when is_binary(value) and byte_size(value) <= 256,
    do: accept(value, value =~ ~r/\A(?!\.)[A-Za-z0-9._-]+(\/(?!\.)[A-Za-z0-9._-]+)?\z/)

  defp cast(:scheduler, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A[A-Za-z0-9_+.() -]{1,64}\z/)

  defp cast(:image, value)
       when is_binary(value) and byte_size(value) >= 12 and byte_size(value) <= @max_image,
       do: accept(value, image?(value))

  defp cast(:wait, :infinity), do: {:ok, :infinity}
  defp cast(:wait, value), do: cast({:integer, 0, @longest_wait}, value)

  defp cast({:one_of, atoms}, value) when is_atom(value) or is_binary(value) do
    case Enum.find(atoms, &(&1 == value or Atom.to_string(&1) == value)) do
      nil -> :error
      atom -> {:ok, atom}
    end
  end

  defp cast({:list, type, max}, value) when is_list(value) do
    fits? = not List.improper?(value) and length(value) <= max
    accept(value, fits? and Enum.all?(value, &match?({:ok, _}, cast(type, &1))))
  end

  defp cast({:custom, _description, cast}, value), do: cast.(value)
  defp cast(_type, _value), do: :error

  defp accept(value, true), do: {:ok, value}
  defp accept(_value, false), do: :error

  @doc "Whether these bytes begin as a PNG, JPEG or WebP file does."
  @spec image?(binary) :: boolean
  def image?(<<0x89, "PNG\r\n", 0x1A, "\n", _::binary>>), do: true
  def image?(<<0xFF, 0xD8, 0xFF, _::binary>>), do: true
  def image?(<<"RIFF", _size::32, "WEBP", _::binary>>), do: true
  def image?(_data), do: false

  defp describe(:boolean), do: "true or false"
  defp describe(:atom), do: "an atom"
  defp describe(:wait), do: "milliseconds from 0 to #{@longest_wait}, or :infinity"
  defp describe(:id), do: "1 to 128 of A-Z a-z 0-9 . _ : -"
  defp describe(:scheduler), do: "1 to 64 of A-Z a-z 0-9 _ + . ( ) - and space"
  defp describe(:image), do: "a PNG, JPEG or WebP file of at most 12 MiB"

  defp describe(:prompt),
    do: "1 to #{@max_prompt} bytes of text, not only white space and without NUL"

  defp describe(:model_id) do
    "a model name or owner/name of at most 256 of A-Z a-z 0-9 . _ -, " <>
      "no part beginning with a dot"
  end

  defp describe({:integer, min, max}), do: "an integer from #{bound(min)} to #{bound(max)}"
  defp describe({:multiple_of, n, min, max}), do: "a multiple of #{n} from #{min} to #{max}"
  defp describe({:number, min, max}), do: "a number from #{min} to #{max}"
  defp describe({:text, 0, max}), do: "at most #{max} bytes of text without NUL"
  defp describe({:text, min, max}), do: "#{min} to #{max} bytes of text without NUL"
  defp describe({:one_of, atoms}), do: "one of #{Enum.join(atoms, ", ")}"
  defp describe({:list, type, max}), do: "a list of up to #{max}, each #{describe(type)}"

  defp describe({:custom, description, _cast}), do: description

  defp bound(0x7FFFFFFFFFFFFFFF), do: "2^63 - 1"
  defp bound(integer), do: Integer.to_string(integer)

  # Text of users is not repeated at length.
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
end
