defmodule StarweaveImage.Type do
  @moduledoc false

  # The types of values from outside: the only place where these are cast and described. `describe/1` completes "name
  # must be …" in the same words as the Python side (tests/contract/schema.json); `spec/2` gives the typespec for
  # Dialyzer.
  #
  # Options are written by people, so their types have a description and a typespec. Messages and records come from
  # programs, as maps with string keys, and are cast to maps with atom keys; `:record` and the types after it are for
  # them.
  #
  # A named type is for rules that parameters cannot express. Regular expressions stay inside functions, since newer
  # releases of Erlang do not allow them in module attributes.

  @type t ::
          :boolean
          | :atom
          | :prompt
          | :id
          | :model_id
          | :scheduler
          | :device
          | :revision
          | :sha256
          | :image
          | :wait
          | {:integer, integer, integer}
          # Milliseconds; the name on the wire ends in `_ms`.
          | {:ms, integer, integer}
          | {:bytes, integer, integer}
          | {:multiple_of, pos_integer, integer, integer}
          | {:number, number, number}
          | {:text, min_bytes :: non_neg_integer, max_bytes :: pos_integer}
          | {:one_of, [atom]}
          | {:list, t, max :: pos_integer}
          # A list that is not empty.
          | {:some, t, max :: pos_integer}
          | {:map, key :: t, value :: t, max :: pos_integer}
          | {:tuple, [t]}
          | {:either, [t]}
          | {:maybe, t}
          # A keyword list with these keys only; nil values are left out.
          | {:options, [{atom, t}]}
          | {:function, arity}
          # A type with its own description, where that of its parts would be too long.
          | {:described, String.t(), t}
          # A map of which these keys are read, and all others ignored.
          | {:record, [{atom, t}]}
          | {:data, min_bytes :: pos_integer, max_bytes :: pos_integer}
          | :integer
          | :count
          | :float
          | :text
          | :map
          | :media_type

  @max_prompt 8_192
  @max_image 12 * 1024 * 1024
  # The longest time that a BEAM timer accepts, in ms.
  @longest_wait 0xFFFFFFFF

  @doc """
  Casts a value to the type.
      iex> StarweaveImage.Type.cast({:one_of, [:png, :jpeg]}, "jpeg")
      {:ok, :jpeg}
      iex> StarweaveImage.Type.cast({:number, 0, 50}, 7)
      {:ok, 7.0}
      iex> StarweaveImage.Type.cast({:options, [capacity: {:integer, 1, 64}]}, capacity: 0)
      :error
      iex> StarweaveImage.Type.cast({:record, size: {:record, width: :count}}, %{"size" => %{"width" => -1}})
      {:error, "size.width"}
  """
  @spec cast(t, term) :: {:ok, term} | :error | {:error, path :: String.t()}
  def cast(:boolean, value) when is_boolean(value), do: {:ok, value}

  def cast(:atom, value) when is_atom(value) and not is_boolean(value) and value != nil,
    do: {:ok, value}

  def cast({name, min, max}, value)
      when name in [:integer, :ms, :bytes] and is_integer(value) and value >= min and value <= max,
      do: {:ok, value}

  def cast({:multiple_of, n, min, max}, value)
      when is_integer(value) and value >= min and value <= max and rem(value, n) == 0,
      do: {:ok, value}

  # Normalises -0.0 to 0.0, for later readers of the value.
  def cast({:number, min, max}, value) when is_number(value) and value >= min and value <= max,
    do: {:ok, value + 0.0}

  def cast({:text, min, max}, value)
      when is_binary(value) and byte_size(value) >= min and byte_size(value) <= max,
      do: accept(value, String.valid?(value) and not String.contains?(value, "\0"))

  def cast(:prompt, value) do
    with {:ok, value} <- cast({:text, 1, @max_prompt}, value),
         do: accept(value, String.trim(value) != "")
  end

  def cast(:id, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A[A-Za-z0-9._:-]{1,128}\z/)

  def cast(:model_id, value) when is_binary(value) and byte_size(value) <= 256,
    do: accept(value, value =~ ~r/\A(?!\.)[A-Za-z0-9._-]+(\/(?!\.)[A-Za-z0-9._-]+)?\z/)

  def cast(:scheduler, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A[A-Za-z0-9_+.() -]{1,64}\z/)

  def cast(:device, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A(auto|cpu|mps|xpu|cuda(:[0-9]{1,3})?)\z/)

  def cast(:revision, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A[A-Za-z0-9._\/-]{1,256}\z/)

  def cast(:sha256, value) when is_binary(value),
    do: accept(value, value =~ ~r/\A[0-9a-f]{64}\z/)

  def cast(:image, value)
      when is_binary(value) and byte_size(value) >= 12 and byte_size(value) <= @max_image,
      do: accept(value, image?(value))

  def cast(:wait, :infinity), do: {:ok, :infinity}
  def cast(:wait, value), do: cast({:integer, 0, @longest_wait}, value)

  def cast({:one_of, atoms}, value) when is_atom(value) or is_binary(value) do
    case Enum.find(atoms, &(&1 == value or Atom.to_string(&1) == value)) do
      nil -> :error
      atom -> {:ok, atom}
    end
  end

  def cast({:list, type, max}, values) when is_list(values) do
    if not List.improper?(values) and length(values) <= max,
      do: each(values, &cast(type, &1)),
      else: :error
  end

  def cast({:some, type, max}, [_ | _] = values), do: cast({:list, type, max}, values)

  def cast({:map, key, value, max}, map)
      when is_map(map) and not is_struct(map) and map_size(map) <= max do
    with {:ok, pairs} <- each(Map.to_list(map), &cast({:tuple, [key, value]}, &1)),
         do: {:ok, Map.new(pairs)}
  end

  def cast({:tuple, types}, value) when is_tuple(value) and tuple_size(value) == length(types) do
    with {:ok, values} <- types |> Enum.zip(Tuple.to_list(value)) |> each(&cast_pair/1),
         do: {:ok, List.to_tuple(values)}
  end

  def cast({:either, types}, value) do
    Enum.find_value(types, :error, fn type ->
      with {:ok, value} <- cast(type, value), do: {:ok, value}, else: (_no -> nil)
    end)
  end

  def cast({:maybe, _type}, nil), do: {:ok, nil}
  def cast({:maybe, type}, value), do: cast(type, value)

  # If a name occurs more than once, the first one counts.
  def cast({:options, types}, options) do
    with true <- Keyword.keyword?(options),
         {:ok, values} <- options |> Enum.uniq_by(&elem(&1, 0)) |> each(&cast_option(types, &1)) do
      {:ok, Enum.reject(values, fn {_name, value} -> value == nil end)}
    else
      _no_options -> :error
    end
  end

  def cast({:record, fields}, %{} = map) when not is_struct(map) do
    Enum.reduce_while(fields, {:ok, %{}}, fn {name, type}, {:ok, record} ->
      case cast(type, Map.get(map, Atom.to_string(name))) do
        {:ok, value} -> {:cont, {:ok, Map.put(record, name, value)}}
        :error -> {:halt, {:error, Atom.to_string(name)}}
        {:error, path} -> {:halt, {:error, "#{name}.#{path}"}}
      end
    end)
  end

  def cast({:data, min, max}, value)
      when is_binary(value) and byte_size(value) >= min and byte_size(value) <= max,
      do: {:ok, value}

  def cast(:integer, value) when is_integer(value), do: {:ok, value}
  def cast(:count, value) when is_integer(value) and value >= 0, do: {:ok, value}
  def cast(:float, value) when is_number(value), do: {:ok, value + 0.0}
  def cast(:text, value) when is_binary(value), do: accept(value, String.valid?(value))
  def cast(:map, value) when is_map(value) and not is_struct(value), do: {:ok, value}

  def cast(:media_type, value) when is_binary(value) and byte_size(value) <= 128,
    do: accept(value, value =~ ~r"\A[a-z0-9.+-]+/[a-z0-9.+-]+\z")

  def cast({:function, arity}, value) when is_function(value, arity), do: {:ok, value}
  def cast({:described, _words, type}, value), do: cast(type, value)
  def cast(_type, _value), do: :error

  defp cast_pair({type, value}), do: cast(type, value)

  defp cast_option(types, {name, value}) do
    with {:ok, value} <- cast(types[name], value), do: {:ok, {name, value}}
  end

  defp each(values, cast) do
    values
    |> Enum.reduce_while([], fn value, done ->
      case cast.(value) do
        {:ok, value} -> {:cont, [value | done]}
        no -> {:halt, no}
      end
    end)
    |> case do
      done when is_list(done) -> {:ok, Enum.reverse(done)}
      no -> no
    end
  end

  defp accept(value, true), do: {:ok, value}
  defp accept(_value, false), do: :error

  @doc """
  Whether these bytes begin as a PNG, JPEG or WebP file does.

      iex> StarweaveImage.Type.image?("a red apple")
      false
  """
  @spec image?(binary) :: boolean
  def image?(<<0x89, "PNG\r\n", 0x1A, "\n", _::binary>>), do: true
  def image?(<<0xFF, 0xD8, 0xFF, _::binary>>), do: true
  def image?(<<"RIFF", _size::32, "WEBP", _::binary>>), do: true
  def image?(_data), do: false

  @doc """
  The end of the sentence "name must be …".

      iex> StarweaveImage.Type.describe({:multiple_of, 8, 64, 4096})
      "a multiple of 8 from 64 to 4096"
  """
  @spec describe(t) :: String.t()
  def describe(:boolean), do: "true or false"
  def describe(:atom), do: "an atom"
  def describe(:wait), do: "milliseconds from 0 to #{@longest_wait}, or :infinity"
  def describe(:id), do: "1 to 128 of A-Z a-z 0-9 . _ : -"
  def describe(:scheduler), do: "1 to 64 of A-Z a-z 0-9 _ + . ( ) - and space"
  def describe(:device), do: "one of auto, cpu, cuda, cuda:N, mps, xpu"
  def describe(:revision), do: "1 to 256 of A-Z a-z 0-9 . _ / -"
  def describe(:sha256), do: "64 of 0-9 a-f"
  def describe(:image), do: "a PNG, JPEG or WebP file of at most 12 MiB"

  def describe(:prompt),
    do: "1 to #{@max_prompt} bytes of text, not only white space and without NUL"

  def describe(:model_id) do
    "a model name or owner/name of at most 256 of A-Z a-z 0-9 . _ -, " <>
      "no part beginning with a dot"
  end

  def describe({name, min, max}) when name in [:integer, :ms],
    do: "an integer from #{bound(min)} to #{bound(max)}"

  def describe({:bytes, min, max}), do: "an integer of bytes from #{bound(min)} to #{bound(max)}"
  def describe({:multiple_of, n, min, max}), do: "a multiple of #{n} from #{min} to #{max}"
  def describe({:number, min, max}), do: "a number from #{min} to #{max}"
  def describe({:text, 0, max}), do: "at most #{max} bytes of text without NUL"
  def describe({:text, min, max}), do: "#{min} to #{max} bytes of text without NUL"
  def describe({:one_of, atoms}), do: "one of #{Enum.join(atoms, ", ")}"
  def describe({:list, :model_id, max}), do: "a list of at most #{max} model names"
  def describe({:list, type, max}), do: "a list of at most #{max}, each #{describe(type)}"
  def describe({:some, type, max}), do: "a list of 1 to #{max}, each #{describe(type)}"
  def describe({:map, _key, _value, max}), do: "a map of at most #{max}"
  def describe({:tuple, types}), do: "{#{Enum.map_join(types, ", ", &describe/1)}}"
  def describe({:either, types}), do: Enum.map_join(types, ", or ", &describe/1)
  def describe({:maybe, type}), do: describe(type)
  def describe({:options, types}), do: "options of #{Enum.map_join(types, ", ", &elem(&1, 0))}"
  def describe({:function, 1}), do: "a function of one argument"
  def describe({:function, arity}), do: "a function of #{arity} arguments"
  def describe({:described, words, _type}), do: words

  defp bound(0x7FFFFFFFFFFFFFFF), do: "2^63 - 1"
  defp bound(0x4000000000000), do: "2^50"
  defp bound(0x10000000000), do: "2^40"
  defp bound(integer), do: Integer.to_string(integer)

  @doc """
  The type as a typespec: that of values already `:cast`, or of values that may be `:given`.

      iex> StarweaveImage.Type.spec({:one_of, [:png, :jpeg]}, :cast) |> Macro.to_string()
      ":png | :jpeg"
      iex> StarweaveImage.Type.spec({:number, 0, 1}, :given) |> Macro.to_string()
      "number()"
  """
  @spec spec(t, :cast | :given) :: Macro.t()
  def spec(:boolean, _as), do: quote(do: boolean())
  def spec(:atom, _as), do: quote(do: atom())
  def spec(:image, _as), do: quote(do: binary())
  def spec(:wait, _as), do: quote(do: timeout())
  def spec(name, _as) when is_atom(name), do: quote(do: String.t())
  def spec({:text, _min, _max}, _as), do: quote(do: String.t())
  def spec({:multiple_of, _n, min, max}, as), do: spec({:integer, min, max}, as)

  # A range of many digits is less readable than the type's name.
  def spec({name, 0, max}, _as) when name in [:integer, :ms, :bytes] and max > 0xFFFFFFFF,
    do: quote(do: non_neg_integer())

  def spec({name, _, max}, _as) when name in [:integer, :ms, :bytes] and max > 0xFFFFFFFF,
    do: quote(do: integer())

  def spec({name, min, max}, _as) when name in [:integer, :ms, :bytes],
    do: quote(do: unquote(min)..unquote(max))

  def spec({:number, _min, _max}, :cast), do: quote(do: float())
  def spec({:number, _min, _max}, :given), do: quote(do: number())
  def spec({:one_of, atoms}, :cast), do: union(atoms)
  def spec({:one_of, atoms}, :given), do: union(atoms ++ [quote(do: String.t())])
  def spec({:list, type, _max}, as), do: [spec(type, as)]
  def spec({:some, type, _max}, as), do: [spec(type, as), {:..., [], nil}]

  def spec({:map, key, value, _max}, as),
    do: quote(do: %{optional(unquote(spec(key, as))) => unquote(spec(value, as))})

  def spec({:tuple, types}, as), do: {:{}, [], Enum.map(types, &spec(&1, as))}
  def spec({:either, types}, as), do: types |> Enum.map(&spec(&1, as)) |> union()

  def spec({:maybe, type}, as), do: union([spec(type, as), nil])

  def spec({:options, types}, as) do
    [union(for {name, type} <- types, do: {name, spec(type, as)})]
  end

  def spec({:function, arity}, _as) do
    arguments = List.duplicate(quote(do: term()), arity)
    [{:->, [], [arguments, quote(do: term())]}]
  end

  def spec({:described, _words, type}, as), do: spec(type, as)

  @doc """
  The union of several typespecs.

      iex> [1, 2, 3] |> StarweaveImage.Type.union() |> Macro.to_string()
      "1 | 2 | 3"
  """
  @spec union([Macro.t(), ...]) :: Macro.t()
  def union(types) do
    [last | others] = Enum.reverse(types)
    Enum.reduce(others, last, &{:|, [], [&1, &2]})
  end
end
